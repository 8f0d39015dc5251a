"""Starts a service, and ends it without losing anything in flight."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import grpc
import grpc.aio

from loraplex_engine.link.bus_directory import BusDirectory
from loraplex_service.assembly import Application, LaunchFor, assemble
from loraplex_service.auth.door import Door
from loraplex_service.config import ServiceConfig
from loraplex_service.control.metrics_snapshot import Served
from loraplex_service.errors import Unavailable
from loraplex_service.http.process import http_process
from loraplex_service.http.settings import DoorSettings
from loraplex_service.keeping import kept
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.machines import meeting_options
from loraplex_service.models.supervisor import Launch, launcher
from loraplex_service.ports.config import LimitsConfig
from loraplex_service.ports.interceptors import CallInterceptor, CallLimits
from loraplex_service.ports.listeners import ConnectionLimits, Service, build_server, drain
from loraplex_service.ports.probes import build_probe_server
from loraplex_service.ports.receiving import ReceiveLimits
from loraplex_service.ports.tls import server_credentials
from loraplex_service.requests.prompts import TextWork
from loraplex_service.spare_memory import keep_giving_back
from loraplex_service.telemetry.lag import observe_lag
from loraplex_service.telemetry.setup import telemetry_of
from loraplex_service.text import TemplateLimits, TemplateRenderer


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of the two listeners, with the actual port where the configuration says 0."""

    data: str
    admin: str
    health: str | None = None  # None: no port for probes is configured
    metrics: str | None = None  # None: no Prometheus page is configured
    http: str | None = None  # None: no HTTP is configured


def engine_processes(config: ServiceConfig) -> LaunchFor:
    """Launch each engine as a process of its own."""

    def launch_for(model: HostedModelConfig) -> Launch:
        meeting = meeting_options(model, config.machines_listen, config.machines_secret)
        return launcher(model.engine(), model.name, config.log_level, config.log_format, meeting)

    return launch_for


@asynccontextmanager
async def running(
    config: ServiceConfig, launch_for: LaunchFor | None = None
) -> AsyncIterator[tuple[Application, Addresses]]:
    """Run a service that listens, while its models may still be loading. The end of the block drains it.

    `launch_for`: starts engines; None: as processes. Raises RuntimeError for an address that is taken,
    OSError for missing files.
    """
    async with AsyncExitStack() as stack:
        bus_directory = stack.enter_context(BusDirectory())
        workers = TemplateLimits(workers=config.limits.template_workers)
        renderer = await stack.enter_async_context(TemplateRenderer(workers))
        texts = TextWork.of(renderer, config.limits.waiting_text_bytes)
        telemetry = await stack.enter_async_context(telemetry_of(config.usage, config.otlp, config.access_log))
        app = assemble(config, bus_directory, texts, launch_for or engine_processes(config), telemetry)
        health_address = await _start_probes(app, stack)
        metrics_address = await _start_metrics(app, stack)
        door = f"unix:{bus_directory.path}/http"
        data, admin, addresses = _listeners(app, health_address, metrics_address, door)
        shutting_down = Unavailable("DRAINING", "the server is shutting down; try another replica")
        stack.push_async_callback(app.host.close, shutting_down)
        stack.push_async_callback(app.state.close)
        stack.push_async_callback(app.library.close)  # its threads are needed until the work has ended
        stack.push_async_callback(app.work.close)
        lag = partial(observe_lag, telemetry.metrics.loop_lag.of(()))
        for what, keep in (
            ("tell health", app.keep_health),
            ("tell whether requests are let in", app.keep_admitting),
            ("observe the event loop", lag),
            ("give memory back", keep_giving_back),
        ):
            stack.push_async_callback(_end, asyncio.create_task(kept(what, keep), name=what))
        await app.health.start()
        await app.registrar.reconcile()
        if app.replica is not None:
            await stack.enter_async_context(app.replica.listening(app.library))
            stack.push_async_callback(
                _end, asyncio.create_task(kept("keep leases", app.replica.leases.keep), name="leases")
            )
        await app.state.start()
        await app.registrar.sweep()
        app.host.start()
        await app.register_configured()
        await data.start()
        await admin.start()
        addresses = replace(addresses, http=await _start_http(app, stack, door))
        stack.push_async_callback(
            drain,
            (data, admin),
            app.health,
            app.admission,
            app.entrance,
            config.drain_grace_seconds,
            config.lame_duck_seconds,
        )
        stack.push_async_callback(app.probes.drain)
        yield app, addresses


async def _start_probes(app: Application, stack: AsyncExitStack) -> str | None:
    """Open the probe port, if configured: first to open, last to close. Returns its address, or None."""
    address = app.config.health_listen
    if address is None:
        return None
    server, port = build_probe_server(app.probes, address)
    await app.probes.start()
    await server.start()
    stack.push_async_callback(server.stop, None)
    return f"{address.rpartition(':')[0]}:{port}"


async def _start_metrics(app: Application, stack: AsyncExitStack) -> str | None:
    """Serve the metrics page, if configured. Returns its address, or None."""
    if app.config.metrics_listen is None:
        return None
    from loraplex_service.control.metrics_page import MetricsPage, metrics_server

    fleet = None if app.replica is None else app.replica.state.figures
    draining, sequences = lambda: app.admission.draining, lambda: app.admission.sequences
    served = Served(app.telemetry, app.host.all, app.registry.requests, draining, sequences, fleet)
    page = MetricsPage(served, asyncio.get_running_loop())
    return await stack.enter_async_context(metrics_server(page, app.config.metrics_listen))


async def _start_http(app: Application, stack: AsyncExitStack, target: str) -> str | None:
    """Start the HTTP process, if configured. Returns its address, or None."""
    config, limits = app.config, app.config.limits
    if config.http_listen is None:
        return None
    settings = DoorSettings(
        target=target,
        admin_target=_for_admin(target) if config.http_admin else None,
        log_level=config.log_level,
        log_format=config.log_format,
        tls=config.tls,
        hosts=_hosts(config, config.http_listen),
        body_bytes=limits.batch_bytes,
        waiting_bytes=max(limits.waiting_text_bytes, limits.batch_bytes),
        message_seconds=limits.message_seconds,
        unread_seconds=limits.unread_seconds,
        idle_seconds=limits.idle_connection_seconds,
        connections=limits.connections,
        calls_per_connection=limits.calls_per_connection,
    )
    return await stack.enter_async_context(
        http_process(config.http_listen, settings, config.supervision, app.telemetry.metrics.http_requests)
    )


def _hosts(config: ServiceConfig, listen: str) -> tuple[str, ...] | None:
    """The names that HTTP callers may use. A page in a browser has neither a certificate for its name nor a token."""
    asks_all = config.auth is not None and not config.auth.trusted_peers
    return None if config.tls is not None or asks_all else (listen.rpartition(":")[0], *config.http_hosts)


def _for_admin(door: str) -> str:
    """Where the HTTP process reaches the admin port, beside the data port."""
    return f"{door}-admin"


def _listeners(
    app: Application, health_address: str | None, metrics_address: str | None, door: str
) -> tuple[grpc.aio.Server, grpc.aio.Server, Addresses]:
    config = app.config
    call_limits, connections = _call_limits(config.limits), _connection_limits(config.limits)
    interceptor = CallInterceptor(Door(config.auth), call_limits, app.telemetry.observer, app.tenants)

    def listen(services: tuple[Service, ...], address: str) -> tuple[grpc.aio.Server, int]:
        credentials = None if config.tls is None else server_credentials(config.tls)
        return build_server(services, app.health, interceptor, address, credentials, connections)

    data, data_port = listen(app.data, config.listen)
    if config.http_listen is not None:
        data.add_insecure_port(door)  # in a directory that is this user's alone
    admin, admin_port = listen(app.admin, config.admin_listen)
    if config.http_admin:
        admin.add_insecure_port(_for_admin(door))
    app.server.admin_port = admin_port
    hosts = [address.rpartition(":")[0] for address in (config.listen, config.admin_listen)]
    own = (f"{hosts[0]}:{data_port}", f"{hosts[1]}:{admin_port}")
    return data, admin, Addresses(*own, health_address, metrics_address)


def _call_limits(limits: LimitsConfig) -> CallLimits:
    return CallLimits(
        receive=ReceiveLimits(limits.request_bytes, limits.batch_bytes, limits.message_seconds),
        calls_per_tenant=limits.calls_per_tenant,
        unread_seconds=limits.unread_seconds,
        answer_bytes=limits.answer_bytes,
        unread_bytes=limits.unread_bytes,
    )


def _connection_limits(limits: LimitsConfig) -> ConnectionLimits:
    return ConnectionLimits(limits.connections, limits.calls_per_connection, limits.idle_connection_seconds)


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
