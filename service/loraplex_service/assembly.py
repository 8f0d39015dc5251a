"""Puts the parts of a service together from its configuration. Nothing runs here."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.v1.adapters_pb2_grpc import add_AdapterServiceServicer_to_server
from loraplex.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from loraplex.v1.models_pb2_grpc import add_ModelServiceServicer_to_server
from loraplex.v1.pooling_pb2_grpc import add_PoolingServiceServicer_to_server
from loraplex.v1.routes_pb2_grpc import add_RouteServiceServicer_to_server
from loraplex.v1.server_pb2_grpc import add_ServerServiceServicer_to_server
from loraplex.v1.tokenizer_pb2_grpc import add_TokenizerServiceServicer_to_server
from loraplex_adapters.files.depot import Depot
from loraplex_adapters.files.remote import RemoteSources
from loraplex_adapters.files.source import AdapterSource
from loraplex_adapters.records import AdapterChange, ChangeKind
from loraplex_adapters.registry import AdapterRegistry
from loraplex_engine.link.bus_directory import BusDirectory
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.deployer import AdapterDeployer
from loraplex_service.adapters.library import AdapterLibrary
from loraplex_service.adapters.records import AdapterRecords
from loraplex_service.adapters.registrar import AdapterRegistrar
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.admission.admission import Admission, AdmissionLimits
from loraplex_service.admission.cache_key import cache_key
from loraplex_service.admission.places import UnreadAnswers
from loraplex_service.admission.tenants import Tenants
from loraplex_service.config import ServiceConfig
from loraplex_service.control.adapters import AdapterServicer
from loraplex_service.control.models import ModelServicer
from loraplex_service.control.quota import AdapterQuota
from loraplex_service.control.routes import RouteServicer
from loraplex_service.control.server import ServerServicer
from loraplex_service.control.tokenizer import TokenizerServicer
from loraplex_service.dialects.backend import Backend
from loraplex_service.dialects.services import dialect_services
from loraplex_service.latest import Latest
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.host import HostedModel, ModelHost, revision_of
from loraplex_service.models.placement import Placement
from loraplex_service.models.supervisor import EngineState, EngineSupervisor, Launch
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.routing import RouteBook
from loraplex_service.ports.listeners import Health, Service
from loraplex_service.ports.probes import Probes
from loraplex_service.requests.entrance import Entrance, keeps_nothing
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.inference import InferenceServicer
from loraplex_service.requests.pooling import PoolingServicer
from loraplex_service.requests.prompts import TextWork
from loraplex_service.state import State, StateFile
from loraplex_service.telemetry.records import Observer
from loraplex_service.telemetry.setup import Telemetry

VERSION = version("loraplex-server")

# What callers of the data port may look at: they need not reach the admin port to know what they can ask for.
READS = {
    "loraplex.v1.ModelService": ("GetModel", "ListModels"),
    "loraplex.v1.AdapterService": ("GetAdapter", "ListAdapters"),
    "loraplex.v1.RouteService": ("GetRoute", "ListRoutes", "ResolveTarget"),
    "loraplex.v1.ServerService": ("GetServerInfo",),
}

if TYPE_CHECKING:
    from loraplex_service.replica import Replica  # which needs psycopg

LaunchFor = Callable[[HostedModelConfig], Launch]  # how the engine of a model is started


@dataclass(frozen=True, slots=True)
class Application:
    """The parts of a service. `running` starts and ends it."""

    config: ServiceConfig
    telemetry: Telemetry
    host: ModelHost
    registry: AdapterRegistry
    state: State
    library: AdapterLibrary
    registrar: AdapterRegistrar
    work: BackgroundWork
    tenants: Tenants
    quota: AdapterQuota
    admission: Admission
    entrance: Entrance
    inference: InferenceServicer
    server: ServerServicer
    health: Health
    probes: Probes
    data: tuple[Service, ...]
    admin: tuple[Service, ...]
    replica: "Replica | None"  # None: it is a server on its own

    async def register_configured(self) -> None:
        """Register the adapters of the configuration file, all at once."""
        await asyncio.gather(*(self.registrar.create_configured(adapter) for adapter in self.config.adapters))

    async def keep_admitting(self) -> None:
        """Publish whether requests are admitted, after every change. Returns at once if that can never change."""
        usage = self.telemetry.usage
        if usage is None:
            return
        changes = Latest[bool]()
        usage.on_full(lambda full: changes.put("full", full))
        async for full in changes:
            await self.probes.set_admitting(not full)
            await self.health.set_admitting(not full)

    async def keep_health(self) -> None:
        """Publish whether each model serves, after every change. Never returns."""
        changes = Latest[HostedModel]()
        self.host.subscribe(lambda model: changes.put(model.name, model))
        said: dict[str, bool] = {}
        for model in self.host.all():
            changes.put(model.name, model)
        async for model in changes:
            await self.probes.set_state(model.name, model.state)
            serving = model.state is EngineState.ACTIVE
            if said.get(model.name) is not serving:
                said[model.name] = serving
                await self.health.set_model(model.name, serving)


def assemble(
    config: ServiceConfig,
    bus_directory: BusDirectory,
    texts: TextWork,
    launch_for: LaunchFor,
    telemetry: Telemetry,
) -> Application:
    """Connect all parts and read the saved state. Nothing runs yet.

    Raises OSError for an adapter root that does not exist, or a state that cannot be used.
    """
    host = _model_host(config, bus_directory, launch_for)
    kept = _kept(config, telemetry)
    adapters = _adapters(config, bus_directory, host, kept, telemetry)
    requests = _requests(config, host, kept, adapters, telemetry)
    servicers = _servicers(config, texts, host, kept, adapters, requests, telemetry)
    inferring, admin = servicers.inferring(), servicers.admin()
    backend = Backend(
        servicers.inference,
        servicers.pooling,
        servicers.adapters,
        servicers.models,
        servicers.server,
        host,
        requests.catalog,
        kept.tenants,
        VERSION,
        secrets.token_hex(8),
        lambda: health.servicer.is_serving(""),
        config.limits.answer_bytes,
        UnreadAnswers(config.limits.unread_bytes),
    )
    spoken = dialect_services(config.dialects, backend)
    health = Health([service.name for service in (*inferring, *spoken)], [service.name for service in admin])
    return Application(
        config=config,
        telemetry=telemetry,
        host=host,
        registry=kept.registry,
        state=kept.state,
        library=adapters.library,
        registrar=adapters.registrar,
        work=adapters.work,
        tenants=kept.tenants,
        quota=servicers.quota,
        admission=requests.admission,
        entrance=requests.entrance,
        inference=servicers.inference,
        server=servicers.server,
        health=health,
        probes=Probes(model.name for model in config.models if model.load),
        data=(*inferring, *(replace(service, methods=READS[service.name]) for service in admin), *spoken),
        admin=admin,
        replica=kept.replica,
    )


def _model_host(config: ServiceConfig, bus_directory: BusDirectory, launch_for: LaunchFor) -> ModelHost:
    placement = Placement(config.models)

    def supervise(model: HostedModelConfig, changed: Callable[[], None]) -> EngineSupervisor:
        return EngineSupervisor(
            model.name,
            launch_for(model),
            partial(revision_of, model),
            placement.seat(model.name),
            bus_directory,
            config.supervision,
            changed,
            config.limits.unread_tokens,
        )

    return ModelHost(config.models, supervise)


def _state_directory(config: ServiceConfig) -> Path | None:
    return Path(config.state_directory) if config.state_directory else None


# ---- what is kept: by this server alone, or by all replicas of a fleet ---------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kept:
    replica: "Replica | None"  # None: the server is on its own
    state: State
    registry: AdapterRegistry
    tenants: Tenants


def _kept(config: ServiceConfig, telemetry: Telemetry) -> _Kept:
    directory = _state_directory(config)
    local = StateFile(directory)
    replica = _replica(config, local)
    registry = AdapterRegistry() if replica is None else replica.registry
    registry.subscribe(partial(_tell_removed, registry, telemetry.observer))
    tenants = Tenants(
        config.tenants,
        config.other_tenants,
        cache_key=cache_key(directory),
        make_bucket=None if replica is None else replica.leases.bucket,
    )
    return _Kept(replica, local if replica is None else replica.state, registry, tenants)


def _replica(config: ServiceConfig, local: StateFile) -> "Replica | None":
    """The parts of a replica; None: the server is on its own. Raises OSError."""
    if config.state is None:
        return None
    from loraplex_service.replica import Replica

    return Replica(config, config.state, local)


def _tell_removed(registry: AdapterRegistry, observer: Observer, change: AdapterChange) -> None:
    """Tell the observer when the last version of an adapter is gone."""
    if change.kind is ChangeKind.REMOVED and registry.record(change.version.key.name) is None:
        observer.adapter_removed(change.version.name)


# ---- adapters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Adapters:
    library: AdapterLibrary
    texts: AdapterTexts
    work: BackgroundWork
    records: AdapterRecords
    deployer: AdapterDeployer
    registrar: AdapterRegistrar


def _adapters(
    config: ServiceConfig, bus_directory: BusDirectory, host: ModelHost, kept: _Kept, telemetry: Telemetry
) -> _Adapters:
    """Their files, their records, and what brings both to engines. Raises OSError for a root that does not exist."""
    depot = Depot((_state_directory(config) or bus_directory.path) / "adapters")
    remote = RemoteSources(config.adapter_sources, config.object_store, config.limits.upload_bytes)
    library = AdapterLibrary(AdapterSource([Path(root) for root in config.adapter_roots]), remote, depot)
    texts = AdapterTexts(lambda version: str(library.directory(version)))
    work, replica = BackgroundWork(), kept.replica
    records = AdapterRecords(kept.registry, kept.state) if replica is None else replica.records(work)
    deployer = AdapterDeployer(kept.registry, library, host, records, texts, work, telemetry.metrics.adapter_loads)
    find_files = None if replica is None else replica.files(library).find
    registrar = AdapterRegistrar(kept.registry, records, deployer, library, host, kept.tenants, work, find_files)
    return _Adapters(library, texts, work, records, deployer, registrar)


# ---- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Requests:
    routes: RouteBook
    catalog: Catalog
    admission: Admission
    entrance: Entrance


def _requests(
    config: ServiceConfig, host: ModelHost, kept: _Kept, adapters: _Adapters, telemetry: Telemetry
) -> _Requests:
    """What names mean, and the way in that all requests take."""
    limits, usage = config.limits, telemetry.usage
    routes = RouteBook(kept.state)
    catalog = Catalog(host, kept.registry, routes)
    admission = Admission(
        AdmissionLimits(limits.in_flight_sequences, limits.in_flight_cache_tokens, limits.expected_output_tokens),
        check_records=(lambda: None) if usage is None else usage.check_room,
    )
    entrance = Entrance(
        catalog,
        admission,
        kept.tenants,
        adapters.deployer.directory,
        max_load_wait_seconds=limits.adapter_load_wait_seconds,
        resume_seconds=config.supervision.resume_seconds,
        observer=telemetry.observer,
        adapter_texts=adapters.texts,
        recorded=keeps_nothing if usage is None else usage.written,
    )
    return _Requests(routes, catalog, admission, entrance)


# ---- the services of the contract ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Servicers:
    inference: InferenceServicer
    pooling: PoolingServicer
    tokenizer: TokenizerServicer
    models: ModelServicer
    adapters: AdapterServicer
    routes: RouteServicer
    server: ServerServicer
    quota: AdapterQuota  # which `adapters` keeps to

    def inferring(self) -> tuple[Service, ...]:
        """What the data port has whole."""
        return (
            Service("loraplex.v1.InferenceService", self.inference, add_InferenceServiceServicer_to_server),
            Service("loraplex.v1.PoolingService", self.pooling, add_PoolingServiceServicer_to_server),
            Service("loraplex.v1.TokenizerService", self.tokenizer, add_TokenizerServiceServicer_to_server),
        )

    def admin(self) -> tuple[Service, ...]:
        """What the admin port has. The data port has what `READS` lists of them."""
        return (
            Service("loraplex.v1.ModelService", self.models, add_ModelServiceServicer_to_server),
            Service("loraplex.v1.AdapterService", self.adapters, add_AdapterServiceServicer_to_server),
            Service("loraplex.v1.RouteService", self.routes, add_RouteServiceServicer_to_server),
            Service("loraplex.v1.ServerService", self.server, add_ServerServiceServicer_to_server),
        )


def _servicers(
    config: ServiceConfig,
    texts: TextWork,
    host: ModelHost,
    kept: _Kept,
    adapters: _Adapters,
    requests: _Requests,
    telemetry: Telemetry,
) -> _Servicers:
    limits, entrance, tenants = config.limits, requests.entrance, kept.tenants
    forms = Forms(texts, telemetry.metrics.form_checks)
    quota = AdapterQuota(kept.registry, adapters.library, tenants, kept.state)
    return _Servicers(
        InferenceServicer(entrance, texts, forms, telemetry.metrics, limits.answer_bytes),
        PoolingServicer(entrance, texts, limits.answer_bytes),
        TokenizerServicer(requests.catalog, texts, tenants, adapters.texts),
        ModelServicer(host, config.drain_grace_seconds),
        AdapterServicer(
            kept.registry,
            adapters.records,
            adapters.registrar,
            adapters.deployer,
            adapters.library,
            host,
            tenants,
            quota,
            forms,
            limits.upload_bytes,
        ),
        RouteServicer(requests.catalog, requests.routes, kept.state, tenants, forms, adapters.deployer.prefetch),
        ServerServicer(host, lambda: requests.admission.draining, telemetry, VERSION, limits),
        quota,
    )
