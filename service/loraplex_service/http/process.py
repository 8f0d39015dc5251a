"""Keeps the HTTP process alive. The service holds its port: callers wait in the queue while a new process starts."""

import asyncio
import importlib.util
import logging
import os
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from loraplex_engine.link.child import child_command
from loraplex_service.http.settings import AnswerCount, DoorSettings
from loraplex_service.models.config import SupervisionConfig
from loraplex_service.telemetry.series import Counter

logger = logging.getLogger(__name__)

BACKLOG = 1024
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "TMPDIR", "LD_LIBRARY_PATH")


@asynccontextmanager
async def http_process(
    address: str, settings: DoorSettings, supervision: SupervisionConfig, answered: Counter
) -> AsyncIterator[str]:
    """Run the process for the length of the block; yields the address with the port that was taken for port 0.

    `answered`: counts its answers, by endpoint and status.

    Raises RuntimeError where what it needs is not installed, OSError for an address that cannot be used.
    """
    if importlib.util.find_spec("uvicorn") is None:
        raise RuntimeError(
            f"http_listen {address!r}: uvicorn is not installed: pip install 'loraplex-server[http]', or leave it out"
        )
    host, _, port = address.rpartition(":")
    with _listening(host.strip("[]"), int(port), settings.unread_seconds) as listener:
        keeping = asyncio.create_task(_keep_alive(listener, settings, supervision, answered), name="http")
        try:
            yield f"{host}:{listener.getsockname()[1]}"
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


def _listening(host: str, port: int, unread_seconds: float) -> socket.socket:
    """The port. Its connections end when what was sent is not taken in time: the kernel sees to it."""
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unread_seconds * 1000))
    try:
        listener.bind(place)
    except OSError:
        listener.close()
        raise
    listener.listen(BACKLOG)
    return listener


async def _keep_alive(
    listener: socket.socket, settings: DoorSettings, supervision: SupervisionConfig, answered: Counter
) -> None:
    delay = supervision.restart_delay_seconds
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        status = await _live(listener, settings, supervision.stop_seconds, answered)
        logger.error("the HTTP process ended with status %d; its log says why", status)
        if clock() - began >= supervision.stable_seconds:
            delay = supervision.restart_delay_seconds
        await asyncio.sleep(delay)
        delay = min(2 * delay, supervision.restart_delay_max_seconds)


async def _live(listener: socket.socket, settings: DoorSettings, stop_seconds: float, answered: Counter) -> int:
    """Run one process from its start to its end, and return its status. When cancelled, have it end."""
    process = await _start(listener, settings)
    assert process.stdout is not None
    counting = asyncio.create_task(_count(process.stdout, answered))
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(stop_seconds):
                    await process.wait()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.gather(counting, return_exceptions=True)


async def _count(lines: asyncio.StreamReader, answered: Counter) -> None:
    """Count what the process tells, until it ends."""
    async for line in lines:
        try:
            counts = msgspec.json.decode(line, type=list[AnswerCount])
        except msgspec.DecodeError:  # printed by something else; unread, it would stop the process in the end
            logger.warning("the HTTP process printed %r", line)
            continue
        for told in counts:
            answered.add((told.endpoint, told.status), told.number)


async def _start(listener: socket.socket, settings: DoorSettings) -> Process:
    # Of the environment nothing that it does not need: it speaks with strangers, and others' secrets may be there.
    kept = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith("GRPC_")}
    command, variables = child_command("loraplex_service.http", str(listener.fileno()))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=PIPE,
        env=kept | variables,
        pass_fds=(listener.fileno(),),
        start_new_session=True,  # Ctrl-C is for the service to act on
    )
    assert process.stdin is not None
    with suppress(ConnectionError):  # it died at once, which the wait for it reports
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        await process.stdin.drain()
    return process
