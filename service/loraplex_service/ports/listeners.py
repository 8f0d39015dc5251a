"""The two ports: their services, their health, and their shutdown without losing requests in flight."""

from __future__ import annotations  # grpc's classes are generic to mypy, and not when they run

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from loraplex_service.admission.admission import Admission
from loraplex_service.errors import LoraplexError, Unavailable
from loraplex_service.ports.health import NOT_SERVING, SERVING, HealthServicer
from loraplex_service.ports.interceptors import CallInterceptor
from loraplex_service.ports.reflection import add_reflection

logger = logging.getLogger(__name__)

MAX_METADATA_BYTES = 8 << 10
MAX_WAITING_CALLS = 16384
NEVER = (1 << 31) - 1  # seconds or milliseconds, to gRPC

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server takes half of the calls of the first, in silence
    ("grpc.max_send_message_length", -1),
    # Calls that wait to be looked at, 16 KiB each. Past these gRPC cancels others, whosever they are, without a reason.
    # So it does with those that have waited for 30 s, unless it is told not to: a call has a deadline of its own.
    ("grpc.server_max_unrequested_time_in_server", NEVER),
    ("grpc.server.max_pending_requests", MAX_WAITING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_WAITING_CALLS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", 60_000),  # finds callers that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # callers may ping while they wait for a first token
)

FLUSH_SECONDS = 1.0  # to wait for the last messages of ended calls, and for watchers, which never end by themselves


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on the connections and streams of one port."""

    connections: int = 1024
    calls: int = 64  # calls in progress on one connection; clients delay further ones, or open another
    idle_seconds: float = 300.0  # seconds without a call, after which a connection is closed


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer, and the function that adds it to a server."""

    name: str  # in full, such as "loraplex.v1.InferenceService"
    servicer: Any
    add: Callable[[Any, Any], None]  # the generated add_…Servicer_to_server
    methods: tuple[str, ...] = ()  # those alone, if any are named

    def hang_on(self, server: grpc.aio.Server) -> None:
        paths = {f"/{self.name}/{method}" for method in self.methods}
        self.add(self.servicer, OneQueue(server, paths))


class OneQueue:
    """A server that registers no single methods with gRPC, which would give each method a queue of its own.

    So one limit covers all waiting calls, and one future is awaited rather than one for each method.
    """

    def __init__(self, server: grpc.aio.Server, paths: Collection[str] = ()) -> None:
        """`paths`: the methods to serve; empty: all."""
        self._server = server
        self._paths = paths

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        chosen = [_Some(handler, self._paths) for handler in handlers] if self._paths else handlers
        self._server.add_generic_rpc_handlers(chosen)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Do nothing: the same methods are added as generic handlers, too."""


class _Some(grpc.GenericRpcHandler):
    """A part of the methods of a service."""

    def __init__(self, handler: grpc.GenericRpcHandler, paths: Collection[str]) -> None:
        self._handler = handler
        self._paths = paths

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._handler.service(handler_call_details) if handler_call_details.method in self._paths else None


class Health:
    """The statuses of grpc.health.v1. Names: "", each service of the data port and of the admin port, models/{model}.

    A model serves while its engine is active; the data port while any model serves; neither while no request is
    admitted. The admin port serves until it is drained.
    """

    def __init__(self, data_services: Sequence[str], admin_services: Sequence[str] = ()) -> None:
        self.servicer = HealthServicer()
        self._data = ("", *data_services)
        self._admin = tuple(admin_services)
        self._models: dict[str, bool] = {}
        self._admitting = True

    async def start(self) -> None:
        """Say what is so before any model has loaded."""
        for name in self._admin:
            self.servicer.set(name, SERVING)
        await self._update_data()

    async def set_model(self, name: str, serving: bool) -> None:
        """Set whether a model serves. `name`: the bare id."""
        self._models[name] = serving
        await self._say(f"models/{name}", serving)
        await self._update_data()

    async def set_admitting(self, admitting: bool) -> None:
        """Whether requests are let in at all."""
        self._admitting = admitting
        for name, serving in self._models.items():
            await self._say(f"models/{name}", serving)
        await self._update_data()

    async def drain(self) -> None:
        """Report NOT_SERVING from now on, whatever is set afterwards."""
        self.servicer.end()

    async def _update_data(self) -> None:
        for name in self._data:
            await self._say(name, any(self._models.values()))

    async def _say(self, name: str, serving: bool) -> None:
        self.servicer.set(name, SERVING if serving and self._admitting else NOT_SERVING)


def options(limits: ConnectionLimits, receive_bytes: int) -> list[tuple[str, int]]:
    """The gRPC options of a port. `max_bytes` limits messages before and after decompression."""
    return [
        *_OPTIONS,
        ("grpc.max_receive_message_length", receive_bytes),
        ("grpc.max_concurrent_streams", limits.calls),
        # Calls that have ended and are still held here: their callers have opened others by then. Beyond these gRPC
        # refuses streams without saying why, which is what stops callers that open and reset them.
        ("grpc.http2.max_deallocating_streams", 2 * limits.calls),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_connection_idle_ms", min(round(limits.idle_seconds * 1000), NEVER)),
    ]


def build_server(
    services: Sequence[Service],
    health: Health,
    interceptor: CallInterceptor,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
    limits: ConnectionLimits | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Build a port with these services, health and reflection, not started. Returns the server and the port number.

    `address`: "host:port"; port 0 takes a free one. `credentials`: None is plaintext. Raises RuntimeError if the
    address is taken.
    """
    largest = interceptor.limits.receive.largest(service.name for service in services)
    server = grpc.aio.server(interceptors=[interceptor], options=options(limits or ConnectionLimits(), largest))
    queue: Any = OneQueue(server)
    for service in services:
        service.hang_on(server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, queue)
    names = [service.name for service in services]
    add_reflection([*names, "grpc.health.v1.Health"], queue)
    return server, bind(server, address, credentials)


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Have the server listen there, once it is started. Returns its port. Raises RuntimeError if it cannot."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:  # gRPC says why in its own log alone
        raise RuntimeError(
            f"cannot listen on {address}: it is taken, maybe by a server that runs already, or is no address of this "
            "machine. `loraplex doctor` looks at the ports; --listen, or listen and the others of the configuration, "
            "set them"
        ) from error


class Endable(Protocol):
    """An object with generations in flight."""

    def end_all(self, error: LoraplexError) -> None:
        """End all generations with this error."""


async def drain(
    servers: Sequence[grpc.aio.Server],
    health: Health,
    admission: Admission,
    running: Endable,
    grace_seconds: float,
    lame_duck_seconds: float = 0.0,
) -> None:
    """Shut down without losing anything in flight.

    Say NOT_SERVING; keep taking requests for the lame-duck time, in which balancers notice; then refuse new ones
    (DRAINING) and let running ones finish. Requests that still run after the grace end with DRAINING too.
    """
    await health.drain()
    await asyncio.sleep(lame_duck_seconds)
    admission.close()
    try:
        async with asyncio.timeout(grace_seconds):
            await admission.wait_idle()
    except TimeoutError:
        logger.warning("requests still run after the grace of %g s; they are ended", grace_seconds)
        running.end_all(Unavailable("DRAINING", "the server is shutting down; try another replica"))
    await asyncio.gather(*(server.stop(FLUSH_SECONDS) for server in servers))
