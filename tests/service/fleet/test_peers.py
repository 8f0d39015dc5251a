"""Replicas send each other files, and nobody else anything."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest
from cryptography import x509

from loraplex.v1.adapters_pb2 import UploadAdapterRequest, UploadFile
from loraplex_adapters.files.source import digest
from loraplex_service.errors import Unavailable
from loraplex_service.fleet import peers
from loraplex_service.fleet.peers import CALLS_AT_ONCE, METHOD, PeerFiles, Wanted, Way, fetched, is_proven, wanted
from loraplex_service.ports.config import TlsConfig
from loraplex_service.ports.tls import server_credentials
from tests.service.authority import Authority
from tests.service.control_plane import write_adapter
from tests.waits import MOST_SECONDS

SECRET = b"of this fleet"
OTHER = "0" * 63 + "1"
OPEN = Way()


@asynccontextmanager
async def serving(directory: Path, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[str]:
    found = {digest(directory): directory}
    server, port = PeerFiles(lambda: SECRET, found.get).server("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def received(address: str, wanted_digest: str, secret: bytes = SECRET, way: Way = OPEN) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    async with fetched(address, wanted_digest, secret, way) as messages:
        async for message in messages:
            if message.HasField("file"):
                files[message.file.name] = b""
            else:
                files[next(reversed(files))] += message.chunk
    return files


async def test_the_files_of_a_digest_come_as_they_are(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    async with serving(directory) as address:
        files = await received(address, digest(directory))
    assert files == {file.name: file.read_bytes() for file in directory.iterdir()}


async def test_who_does_not_know_the_secret_gets_nothing(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    async with serving(directory) as address:
        with pytest.raises(Unavailable, match="UNAUTHENTICATED"):
            await received(address, digest(directory), b"of another fleet")


async def test_what_is_not_here_is_said_not_to_be_here(tmp_path: Path) -> None:
    async with serving(write_adapter(tmp_path / "a")) as address:
        with pytest.raises(Unavailable, match="NOT_FOUND"):
            await received(address, OTHER)


async def test_a_replica_that_is_gone_is_an_error(tmp_path: Path) -> None:
    async with serving(write_adapter(tmp_path / "a")) as address:
        pass
    with pytest.raises(Unavailable):
        await received(address, OTHER)


def test_a_proof_is_of_one_digest_and_of_its_time() -> None:
    now = time.time()
    asked = wanted(SECRET, OTHER, now)
    assert is_proven(asked, SECRET, now)
    assert not is_proven(asked, SECRET, now + 1000)
    assert not is_proven(asked, b"", now)
    assert not is_proven(Wanted("f" * 64, asked.until, asked.proof), SECRET, now)
    assert not is_proven(Wanted(OTHER, asked.until + 1, asked.proof), SECRET, now)
    assert not is_proven(Wanted(OTHER, float("nan"), asked.proof), SECRET, now)


@dataclass(frozen=True)
class Encrypted:
    """Replicas with one certificate, which is for a name that is not where they are reached."""

    root: bytes
    pair: tuple[bytes, bytes]
    server: grpc.ServerCredentials


@pytest.fixture
def encrypted(tmp_path: Path) -> Encrypted:
    authority = Authority("fleet")
    pair = authority.issue("replicas", x509.DNSName("replicas"))
    pair.write(tmp_path, "tls")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    config = TlsConfig(*(str(tmp_path / name) for name in ("tls.crt", "tls.key", "ca.crt")))
    return Encrypted(authority.certificate, (pair.key, pair.certificate), server_credentials(config))


async def test_replicas_know_each_other_by_the_name_of_their_certificates(encrypted: Encrypted, tmp_path: Path) -> None:
    way = Way(grpc.ssl_channel_credentials(encrypted.root, *encrypted.pair), "replicas")
    directory = write_adapter(tmp_path / "a")
    async with serving(directory, encrypted.server) as address:
        files = await received(address, digest(directory), way=way)
    assert files.keys() == {file.name for file in directory.iterdir()}


@pytest.mark.parametrize("wrong", ["name", "authority", "no certificate", "no encryption"])
async def test_who_shows_no_certificate_of_the_fleet_is_not_talked_to(
    encrypted: Encrypted, tmp_path: Path, wrong: str
) -> None:
    root, pair = encrypted.root, encrypted.pair
    way = {
        "name": Way(grpc.ssl_channel_credentials(root, *pair)),
        "authority": Way(grpc.ssl_channel_credentials(Authority("another").certificate, *pair), "replicas"),
        "no certificate": Way(grpc.ssl_channel_credentials(root), "replicas"),
        "no encryption": Way(),
    }[wrong]
    directory = write_adapter(tmp_path / "a")
    async with serving(directory, encrypted.server) as address:
        with pytest.raises(Unavailable, match="UNAVAILABLE"):
            await received(address, digest(directory), way=way)


@asynccontextmanager
async def sending(send: Callable[[Any], Awaitable[None]]) -> AsyncIterator[str]:
    """A replica that sends what it likes."""

    async def answer(request: bytes, context: Any) -> None:
        await send(context)

    service, _, method = METHOD.removeprefix("/").partition("/")
    handler: Any = grpc.unary_stream_rpc_method_handler(answer)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_replica_that_sends_nothing_for_ever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 0.3)

    async def empty_chunks(context: Any) -> None:
        await context.write(UploadAdapterRequest(file=UploadFile(name="a", size_bytes=1)).SerializeToString())
        while True:
            await context.write(UploadAdapterRequest(chunk=b"").SerializeToString())

    async with sending(empty_chunks) as address:
        with pytest.raises(Unavailable, match="too little for too long"):
            await received(address, OTHER)


async def test_who_takes_nothing_loses_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 0.3)
    directory = write_adapter(tmp_path / "a")
    found = digest(directory)
    with (directory / "adapter_model.safetensors").open("ab") as opened:
        opened.truncate(64 << 20)
    files = PeerFiles(lambda: SECRET, lambda digest: directory)
    server, port = files.server("127.0.0.1:0", None)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        asked = msgspec.json.encode(wanted(SECRET, found, time.time()))
        ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(METHOD)
        stuck = [ask(asked) for _ in range(CALLS_AT_ONCE)]
        for call in stuck:
            await call.read()
        async with asyncio.timeout(MOST_SECONDS):
            while files._calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await server.stop(None)
