"""`python -m loraplex_service.http DESCRIPTOR`: the HTTP process, on a socket that listens already.

The first line of its stdin is its DoorSettings, as JSON. It ends when its parent is gone, or has it end: the end of its
stdin says so. Requests that run then end with it; the service has let them finish before.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import msgspec
import uvicorn
import uvloop
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraplex_engine.link.logs import set_up_logging
from loraplex_service.http.door import Door
from loraplex_service.http.exchange import Room
from loraplex_service.http.hosts import Hosts
from loraplex_service.http.patience import Connections, PatientProtocol
from loraplex_service.http.service import Clients
from loraplex_service.http.settings import AnswerCount, DoorSettings
from loraplex_service.http.tls import server_context

TELL_SECONDS: Final = 1.0
FLUSH_SECONDS: Final = 1  # for the last bytes of answers
HEAD_BYTES: Final = 32 << 10  # of a request: more than gRPC takes as metadata


def main() -> None:
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=DoorSettings)
    set_up_logging(settings.log_level, settings.log_format, f"http[{os.getpid()}]")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each request that is no HTTP
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # a group's signals are for the service to act on
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        uvloop.run(serve(settings, listener))


class _Server(uvicorn.Server):
    """Ends when it is told to, and by no signal: streams would be cut that the service still lets finish."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: DoorSettings, listener: socket.socket) -> None:
    """Serve until the end of stdin."""
    clients = Clients(settings.target, settings.calls_per_connection)
    room = Room(settings.body_bytes, settings.waiting_bytes, settings.message_seconds)
    admin = None if settings.admin_target is None else Clients(settings.admin_target, settings.calls_per_connection)
    door = Door(clients, room, version("loraplex-server"), admin, Hosts(settings.hosts))
    server = _Server(_configuration(settings, door))
    stop = partial(setattr, server, "should_exit", True)
    await _at_end_of_stdin(stop)
    telling = asyncio.create_task(_keep_telling(door))
    await server.serve(sockets=[listener])
    telling.cancel()
    _tell(door)
    await door.samples.close()
    await clients.close()
    if admin is not None:
        await admin.close()


async def _keep_telling(door: Door) -> None:
    while True:
        await asyncio.sleep(TELL_SECONDS)
        _tell(door)


def _tell(door: Door) -> None:
    """Tell the parent what was answered since the last time, as one line on stdout."""
    if door.answered:
        counts = [AnswerCount(*labels, number) for labels, number in door.answered.items()]
        door.answered.clear()
        with suppress(BrokenPipeError):  # the parent is gone
            os.write(sys.stdout.fileno(), msgspec.json.encode(counts) + b"\n")


def _configuration(settings: DoorSettings, door: Door) -> uvicorn.Config:
    connections = Connections(settings.connections)

    def protocol(**arguments: Any) -> PatientProtocol:
        return PatientProtocol(H11Protocol(**arguments), settings.message_seconds, connections)

    options: dict[str, Any] = {
        "http": protocol,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # who calls is who connects: nothing that a caller says of it is believed
        "limit_concurrency": settings.connections,
        "timeout_keep_alive": round(settings.idle_seconds),
        "timeout_graceful_shutdown": FLUSH_SECONDS,
        "h11_max_incomplete_event_size": HEAD_BYTES,
    }
    config = uvicorn.Config(door, **options)
    config.load()
    config.ssl = None if settings.tls is None else server_context(settings.tls)
    return config


async def _at_end_of_stdin(stop: Callable[[], None]) -> None:
    """Call `stop` when the parent closes this process's stdin, or is gone."""
    loop = asyncio.get_running_loop()

    class Watch(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            stop()

    await loop.connect_read_pipe(Watch, sys.stdin)


if __name__ == "__main__":
    main()
