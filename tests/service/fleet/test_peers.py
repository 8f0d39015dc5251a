"""Replicas send each other files, and nobody else anything."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loraplex_adapters.files.source import digest
from loraplex_service.errors import Unavailable
from loraplex_service.fleet.peers import PeerFiles, Wanted, fetched, is_proven, wanted
from tests.service.control_plane import write_adapter

SECRET = b"of this fleet"
OTHER = "0" * 63 + "1"


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[str]:
    found = {digest(directory): directory}
    server, port = PeerFiles(lambda: SECRET, found.get).server("127.0.0.1:0", None)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def received(address: str, wanted_digest: str, secret: bytes = SECRET) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    async with fetched(address, wanted_digest, secret, None) as messages:
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
