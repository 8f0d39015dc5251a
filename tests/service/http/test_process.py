"""The HTTP process as callers and operators meet it: a real port, and what becomes of it."""

import asyncio
import importlib.util
import json
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_service.http.process import _listening, _start, http_process
from loraplex_service.http.settings import DoorSettings
from loraplex_service.models.config import SupervisionConfig
from loraplex_service.ports.config import LimitsConfig, TlsConfig
from loraplex_service.telemetry.series import Counter
from tests.service.authority import Authority
from tests.service.control_plane import ControlPlane, control_plane
from tests.waits import MOST_SECONDS

needs_uvicorn = pytest.mark.skipif(
    importlib.util.find_spec("uvicorn") is None, reason="the extra `http` is not installed"
)
ENDLESS = {"model": "tiny", "prompt": "ab", "max_tokens": 1_000_000, "stream": True}


def request_of(path: str, body: Any = None, **headers: str) -> bytes:
    """One request, after which the server closes the connection."""
    content = b"" if body is None else json.dumps(body).encode()
    given = {
        "host": "127.0.0.1",
        "connection": "close",
        "content-type": "application/json",
        "content-length": len(content),
    }
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1"]
    given |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines += [f"{key}: {value}" for key, value in given.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def connected(address: str | None, tls: ssl.SSLContext | None = None) -> tuple[Any, Any]:
    assert address is not None
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port), ssl=tls)


async def ask(address: str | None, request: bytes, tls: ssl.SSLContext | None = None) -> tuple[int, Any]:
    """The status and the body of the answer."""
    reader, writer = await connected(address, tls)
    writer.write(request)
    async with asyncio.timeout(MOST_SECONDS):
        answer = await reader.read()
    writer.close()
    if not answer:
        raise ConnectionError
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def until_idle(control: ControlPlane) -> None:
    async with asyncio.timeout(MOST_SECONDS):
        while control.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
            await asyncio.sleep(0.01)


def children() -> dict[int, str]:
    """The HTTP processes of this one."""
    pids = [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids}
    return {pid: command for pid, command in commands.items() if "loraplex_service.http" in command}


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.fixture
async def served(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """With limits so short that a test can wait for them."""
    limits = LimitsConfig(message_seconds=0.5, unread_seconds=0.5, batch_bytes=1 << 20, request_bytes=1 << 20)
    async with control_plane(byte_tokenizer_directory, tmp_path, http_listen="127.0.0.1:0", limits=limits) as control:
        assert (await ask(control.addresses.http, request_of("/health")))[0] == 200
        yield control


@needs_uvicorn
async def test_a_generation_over_a_real_port(served: ControlPlane) -> None:
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 4}
    status, answer = await ask(served.addresses.http, request_of("/v1/completions", body))
    assert (status, answer["choices"][0]["text"]) == (200, "abab")


@needs_uvicorn
async def test_a_server_without_credentials_goes_by_its_own_names(served: ControlPlane) -> None:
    status, answer = await ask(served.addresses.http, request_of("/v1/models", host="example.org"))
    assert (status, answer["error"]["param"]) == (403, "host")
    assert "http_hosts" in answer["error"]["message"]


@needs_uvicorn
async def test_answers_are_counted_by_endpoint_and_status(served: ControlPlane) -> None:
    for path in ("/version", "/nothing", "/nothing/else"):
        await ask(served.addresses.http, request_of(path))
    counted = served.app.telemetry.metrics.http_requests.values
    async with asyncio.timeout(MOST_SECONDS):
        while ("other", "404") not in counted:  # noqa: ASYNC110 - the process tells nobody else
            await asyncio.sleep(0.01)
    assert (counted["/version", "200"], counted["other", "404"]) == (1, 2)


@needs_uvicorn
async def test_a_caller_on_this_machine_may_name_its_tenant_as_over_grpc(served: ControlPlane) -> None:
    body = {"model": "nobody", "prompt": "ab"}
    _, answer = await ask(served.addresses.http, request_of("/v1/completions", body, loraplex_tenant="acme"))
    assert "'acme'" in answer["error"]["message"]


@needs_uvicorn
async def test_a_process_that_dies_is_replaced_and_the_port_stays(served: ControlPlane) -> None:
    [pid] = children()
    os.kill(pid, signal.SIGKILL)
    assert (await ask(served.addresses.http, request_of("/v1/models")))[0] == 200
    assert pid not in children()


@needs_uvicorn
async def test_a_stream_whose_caller_left_is_forgotten(served: ControlPlane) -> None:
    reader, writer = await connected(served.addresses.http)
    writer.write(request_of("/v1/completions", ENDLESS))
    await reader.readuntil(b"data: ")
    writer.transport.abort()
    await until_idle(served)


@needs_uvicorn
async def test_a_process_that_is_killed_leaves_nothing_running(served: ControlPlane) -> None:
    reader, writer = await connected(served.addresses.http)
    writer.write(request_of("/v1/completions", ENDLESS))
    await reader.readuntil(b"data: ")
    [pid] = children()
    os.kill(pid, signal.SIGKILL)
    await until_idle(served)
    writer.close()


@needs_uvicorn
async def test_a_caller_that_does_not_read_is_cut(served: ControlPlane) -> None:
    host, _, port = str(served.addresses.http).rpartition(":")
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(caller, (host, int(port)))
        await loop.sock_sendall(caller, request_of("/v1/completions", ENDLESS | {"n": 4}))
        async with asyncio.timeout(MOST_SECONDS):
            while not served.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
                await asyncio.sleep(0.01)
        await until_idle(served)


@needs_uvicorn
@pytest.mark.parametrize("said", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "half a head"])
async def test_a_connection_that_says_too_little_is_closed(served: ControlPlane, said: bytes) -> None:
    reader, writer = await connected(served.addresses.http)
    writer.write(said)
    async with asyncio.timeout(MOST_SECONDS):
        assert await reader.read() == b""
    writer.close()


@needs_uvicorn
@pytest.mark.parametrize("said", [b"", b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["nothing", "a request"])
async def test_connections_without_a_request_keep_nobody_out(said: bytes) -> None:
    settings = DoorSettings(target="unix:/nowhere", connections=4)
    async with http_process("127.0.0.1:0", settings, SupervisionConfig(), Counter()) as address:
        opened = [await connected(address) for _ in range(3)]
        for reader, writer in opened:
            writer.write(said)
            if said:
                await reader.readuntil(b"}")
        assert (await ask(address, request_of("/version")))[0] == 200
        async with asyncio.timeout(MOST_SECONDS):
            assert await opened[0][0].read() == b""  # it has waited longest
        for _, writer in opened:
            writer.close()


@needs_uvicorn
async def test_a_body_that_does_not_come_is_not_waited_for(served: ControlPlane) -> None:
    status, answer = await ask(served.addresses.http, request_of("/v1/completions", {}, content_length="10"))
    assert (status, answer["error"]["type"]) == (408, "invalid_request_error")


@needs_uvicorn
@pytest.mark.parametrize("sized", [True, False])
async def test_a_body_that_is_too_large_is_refused(served: ControlPlane, sized: bool) -> None:
    request = request_of("/v1/completions", "x" * (1 << 20))
    if not sized:
        head, _, body = request.partition(b"\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"content-length"))
        request = head + b"\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    status, answer = await ask(served.addresses.http, request)
    assert (status, answer["error"]["code"]) == (413, "message_too_large")


@needs_uvicorn
async def test_a_head_without_end_is_refused(served: ControlPlane) -> None:
    reader, writer = await connected(served.addresses.http)
    writer.write(b"GET / HTTP/1.1\r\nx: " + b"a" * (48 << 10))
    async with asyncio.timeout(MOST_SECONDS):
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
    writer.close()


@needs_uvicorn
async def test_a_stream_ends_before_the_service_does(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    async with control_plane(byte_tokenizer_directory, tmp_path, http_listen="127.0.0.1:0") as control:
        reader, writer = await connected(control.addresses.http)
        writer.write(request_of("/v1/completions", ENDLESS | {"max_tokens": 300}))
        await reader.readuntil(b"data: ")
    assert b"data: [DONE]" in await reader.read()
    writer.close()
    assert not children()


@needs_uvicorn
async def test_a_new_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    files = tmp_path / "tls"
    files.mkdir()
    old, new = Authority("old"), Authority("new")
    old.issue("server").write(files, "server")
    tls = TlsConfig(certificate=str(files / "server.crt"), key=str(files / "server.key"))

    def trusting(authority: Authority) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=authority.certificate.decode())

    async with alone(tls) as address:
        assert (await ask(address, request_of("/version"), trusting(old)))[0] == 200
        new.issue("server").write(files, "server")
        assert (await ask(address, request_of("/version"), trusting(new)))[0] == 200
        with pytest.raises(ssl.SSLError):
            await ask(address, request_of("/version"), trusting(old))


@needs_uvicorn
async def test_a_caller_without_the_certificate_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    authority = Authority("a")
    authority.issue("server").write(tmp_path, "server")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    names = {"certificate": "server.crt", "key": "server.key", "client_ca": "ca.crt"}
    tls = TlsConfig(**{name: str(tmp_path / file) for name, file in names.items()})
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    async with alone(tls) as address:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(address, request_of("/version"), context)
        authority.issue("caller").write(tmp_path, "caller")
        context.load_cert_chain(tmp_path / "caller.crt", tmp_path / "caller.key")
        assert (await ask(address, request_of("/version"), context))[0] == 200


def alone(tls: TlsConfig) -> Any:
    """The process alone, in front of no service."""
    settings = DoorSettings(target="unix:/nowhere", tls=tls)
    return http_process("127.0.0.1:0", settings, SupervisionConfig(), Counter())


async def test_without_uvicorn_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'loraplex-server\[http\]'"):
        async with http_process("127.0.0.1:0", DoorSettings(target="unix:/nowhere"), SupervisionConfig(), Counter()):
            pass


@needs_uvicorn
async def test_a_port_that_is_taken_keeps_the_server_from_starting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match="in use"):
            async with http_process(address, DoorSettings(target="unix:/nowhere"), SupervisionConfig(), Counter()):
                pass


@needs_uvicorn
async def test_a_process_whose_parent_is_gone_ends() -> None:
    with _listening("127.0.0.1", 0, unread_seconds=30.0) as listener:
        process = await _start(listener, DoorSettings(target="unix:/nowhere"))
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(MOST_SECONDS):
            assert await process.wait() == 0


def ignored_signals(pid: int) -> set[signal.Signals]:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    mask = int(status["SigIgn"], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


@needs_uvicorn
async def test_a_process_ends_by_no_signal_that_its_group_may_get(served: ControlPlane) -> None:
    [pid] = children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert number in ignored_signals(pid)
        os.kill(pid, number)
    assert (await ask(served.addresses.http, request_of("/version")))[0] == 200
    assert [pid] == list(children())


@needs_uvicorn
async def test_a_service_that_hangs_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are taken, and nothing is said
        settings = DoorSettings(target=f"127.0.0.1:{silent.getsockname()[1]}")
        async with http_process("127.0.0.1:0", settings, SupervisionConfig(), Counter()) as address:
            assert await ask(address, request_of("/health")) == (503, {"status": "not serving"})


@needs_uvicorn
async def test_a_process_is_given_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    with _listening("127.0.0.1", 0, unread_seconds=30.0) as listener:
        process = await _start(listener, DoorSettings(target="unix:/nowhere"))
        try:
            assert b"hidden" not in environment_of(process.pid)
        finally:
            process.kill()
            await process.communicate()
