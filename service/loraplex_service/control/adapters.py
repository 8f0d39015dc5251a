"""AdapterService: adapters that come and go while the server runs."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.v1 import adapters_pb2_grpc
from loraplex.v1.adapters_pb2 import (
    ADAPTER_RESIDENCY_UNSPECIFIED,
    Adapter,
    AdapterResidency,
    CreateAdapterRequest,
    DeleteAdapterRequest,
    GetAdapterRequest,
    ListAdaptersRequest,
    ListAdaptersResponse,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    UpdateAdapterRequest,
    UploadAdapterRequest,
    WatchAdaptersRequest,
    WatchAdaptersResponse,
)
from loraplex.v1.generation_pb2 import Constraint
from loraplex.v1.watch_pb2 import (
    WATCH_EVENT_TYPE_EXISTING,
    WATCH_EVENT_TYPE_SNAPSHOT_END,
)
from loraplex_adapters.errors import AdapterConflict, AdapterNotFound
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterChange, ChangeKind
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import AdapterSpec, AdapterState, AdapterVersion, full_name
from loraplex_service.adapters.deployer import AdapterDeployer
from loraplex_service.adapters.library import AdapterFiles, AdapterLibrary
from loraplex_service.adapters.records import AdapterRecords
from loraplex_service.adapters.registrar import AdapterRegistrar
from loraplex_service.admission.tenants import Tenants
from loraplex_service.call import sees_inside
from loraplex_service.control.adapter_messages import RESIDENCIES, AdapterMessages, owner_of, validated_adapter
from loraplex_service.control.once import Once
from loraplex_service.control.paging import page
from loraplex_service.control.quota import AdapterQuota, Incoming
from loraplex_service.control.sight import seen_tenants
from loraplex_service.control.uploads import receive_files, upload_header
from loraplex_service.control.waiting import wait_seconds, wait_until
from loraplex_service.errors import (
    Aborted,
    FailedPrecondition,
    InvalidRequest,
    LoraplexError,
    NotFound,
    Unavailable,
    unknown_adapter,
)
from loraplex_service.latest import Latest
from loraplex_service.models.host import ModelHost
from loraplex_service.names.grammar import adapter_name, model_id, tenant_id
from loraplex_service.requests.forms import Forms

Context = grpc.aio.ServicerContext[Any, Any]

UPDATABLE = ("labels", "pinned", "default_constraint", "version")


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """Serves the registry's versions as resources. Changes go through the records, which save them."""

    def __init__(
        self,
        registry: AdapterRegistry,
        records: AdapterRecords,
        registrar: AdapterRegistrar,
        deployer: AdapterDeployer,
        library: AdapterLibrary,
        host: ModelHost,
        tenants: Tenants,
        quota: AdapterQuota,
        forms: Forms,
        max_upload_bytes: int,
    ) -> None:
        self._registry = registry
        self._records = records
        self._registrar = registrar
        self._deployer = deployer
        self._library = library
        self._host = host
        self._messages = AdapterMessages(host)
        self._tenants = tenants
        self._max_upload_bytes = max_upload_bytes
        self._quota = quota
        self._forms = forms
        self._once = Once()

    # ---- looking -----------------------------------------------------------------------------------------------------

    async def GetAdapter(self, request: GetAdapterRequest, context: Context) -> Adapter:  # noqa: N802
        return self._messages.of(self._get(request.name))

    async def ListAdapters(self, request: ListAdaptersRequest, context: Context) -> ListAdaptersResponse:  # noqa: N802
        versions = self._registry.list_versions(
            seen_tenants(request.parent),
            model_id(request.base_model, "base_model") if request.HasField("base_model") else None,
            request.include_versions,
        )
        shown, token = page(versions, lambda version: version.version_name, self._messages.of, request)
        return ListAdaptersResponse(adapters=shown, next_page_token=token)

    async def WatchAdapters(  # noqa: N802
        self, request: WatchAdaptersRequest, context: Context
    ) -> AsyncGenerator[WatchAdaptersResponse, None]:
        tenants = seen_tenants(request.parent)
        base_model = model_id(request.base_model, "base_model") if request.HasField("base_model") else None
        changes = Latest[AdapterChange]()
        sees = {owner: sees_inside(owner) for owner in tenants or ()}  # all, for who may ask for all

        def put(change: AdapterChange) -> None:
            version = change.version
            owner = owner_of(version)
            if change.kind is ChangeKind.MOVED and not sees.get(owner, True):
                return
            if (tenants is None or owner in tenants) and base_model in (None, version.spec.base_model):
                changes.put(version.version_name, change)

        unsubscribe = self._registry.subscribe(put)
        try:
            for version in self._registry.list_versions(tenants, base_model, include_versions=True):
                yield WatchAdaptersResponse(type=WATCH_EVENT_TYPE_EXISTING, adapter=self._messages.of(version))
            yield WatchAdaptersResponse(type=WATCH_EVENT_TYPE_SNAPSHOT_END)
            async for change in changes:
                yield self._messages.of_change(change)
        finally:
            unsubscribe()

    # ---- registering -------------------------------------------------------------------------------------------------

    async def CreateAdapter(self, request: CreateAdapterRequest, context: Context) -> Adapter:  # noqa: N802
        return await self._once.run("CreateAdapter", request.request_id, lambda: self._create(request))

    async def UploadAdapter(  # noqa: N802
        self, request_iterator: AsyncIterator[UploadAdapterRequest], context: Context
    ) -> Adapter:
        header = await upload_header(request_iterator)

        async def upload() -> Adapter:
            tenant = tenant_id(header.parent, "header.parent")
            assert tenant is not None, "tenants/- is refused before"
            base_model = model_id(header.adapter.base_model, "header.adapter.base_model")
            with self._quota.upload(tenant) as incoming:
                announce = partial(self._quota.announce, incoming)
                async with self._library.gather() as gathering:
                    directory, most = gathering.directory, self._max_upload_bytes
                    with self._deployer.reading_ahead(self._tenants.get(tenant), base_model, directory) as ahead:
                        await receive_files(request_iterator, gathering, most, announce, ahead.written)
                        files = replace(await gathering.check("upload"), upload=ahead.upload)
                        return await self._register(header, files, incoming)

        return await self._once.run("UploadAdapter", header.request_id, upload)

    async def _create(self, request: CreateAdapterRequest) -> Adapter:
        async with self._library.find(request.adapter.source) as files:
            return await self._register(request, files)

    async def _register(
        self, request: CreateAdapterRequest, files: AdapterFiles, incoming: Incoming | None = None
    ) -> Adapter:
        """Register, or only validate, a version whose files have been found."""
        residency = _residency(request.residency, Residency.HOST, (Residency.HOST, Residency.DEVICE))
        tenant = tenant_id(request.parent, "parent")
        assert tenant is not None, "tenants/- is refused above"
        spec = AdapterSpec(
            base_model=model_id(request.adapter.base_model, "adapter.base_model"),
            source=request.adapter.source,
            labels=dict(request.adapter.labels),
            pinned=request.adapter.pinned,
            residency=residency,
            make_current=request.make_current if request.HasField("make_current") else True,
            default_constraint=_saved(request.adapter.default_constraint),
        )
        seconds = wait_seconds(request)
        await self._check_form(tenant, request.adapter)
        if request.adapter.digest and request.adapter.digest != f"sha256:{files.digest}":
            raise InvalidRequest.at("adapter.digest", f"the files have another one, sha256:{files.digest}")
        await self._library.check_trust(self._tenants.get(tenant), files.digest, files.directory)
        files = self._registrar.check_rank(files, spec.base_model)
        key = AdapterKey(f"{tenant}/{request.adapter_id}", files.digest)
        if request.validate_only:
            info = await self._deployer.validate(tenant, request.adapter_id, spec.base_model, files)
            return validated_adapter(key, spec, info)
        check = partial(self._quota.check, key, files.directory, request.adapter.ByteSize(), incoming)
        version = await self._registrar.create_saved(tenant, request.adapter_id, spec, files, check)
        deadline = asyncio.get_running_loop().time() + seconds
        version = await self._wait_while(version, AdapterState.LOADING, seconds)
        with suppress(Unavailable):  # it is registered: a restart reads it again, and the name means it then
            await self._records.saved()
        if version.state is AdapterState.ACTIVE and (spec.pinned or residency is Residency.DEVICE):
            loading = self._deployer.load(version, Residency.DEVICE)
            await asyncio.wait({loading}, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        return self._messages.of(self._find(version.key) or version)

    # ---- changing ----------------------------------------------------------------------------------------------------

    async def UpdateAdapter(self, request: UpdateAdapterRequest, context: Context) -> Adapter:  # noqa: N802
        async def update() -> Adapter:
            return self._messages.of(await self._update(request.adapter, _fields_to_change(request.update_mask)))

        return await self._once.run("UpdateAdapter", request.request_id, update)

    async def _update(self, wanted: Adapter, fields: set[str]) -> AdapterVersion:
        version = self._get(wanted.name, "adapter.name")
        _check_etag(version, wanted.etag)
        if "default_constraint" in fields:
            await self._check_form(owner_of(version), wanted)
        if "version" in fields:
            version = self._next_current(wanted)
        repins = "pinned" in fields and wanted.pinned is not version.spec.pinned
        if repins:
            await self._deployer.pin(version, wanted.pinned)  # what may fail comes before what does not
        try:
            return await self._records.change(
                version.key.name,
                lambda registry: _updated(registry, version, wanted, fields),
                partial(self._check_update, version, wanted, fields),
            )
        except LoraplexError:
            if repins:
                await self._deployer.pin(version, version.spec.pinned)
            raise

    def _check_update(self, version: AdapterVersion, wanted: Adapter, fields: set[str]) -> None:
        _check_etag(self._get(wanted.name, "adapter.name"), wanted.etag)
        if "labels" in fields:
            more = Adapter(labels=wanted.labels).ByteSize() - Adapter(labels=version.spec.labels).ByteSize()
            self._quota.check_state(owner_of(version), more)
        if "default_constraint" in fields:
            more = wanted.default_constraint.ByteSize() - len(version.spec.default_constraint)
            self._quota.check_state(owner_of(version), more)

    async def _check_form(self, tenant: str, adapter: Adapter) -> None:
        """Raise InvalidRequest for a default constraint that no engine can keep to."""
        path = "adapter.default_constraint"
        await self._forms.grammar(adapter.default_constraint, self._tenants.get(tenant), path)

    def _next_current(self, wanted: Adapter) -> AdapterVersion:
        """The version to which an alias is to move. Raises InvalidRequest, NotFound, FailedPrecondition."""
        adapter_name(wanted.name, "adapter.name", version_allowed=False)
        if not wanted.version.startswith(f"{wanted.name}@"):
            raise InvalidRequest.at("adapter.version", f"{wanted.version[:200]!r} is no version of {wanted.name}")
        version = self._get(wanted.version, "adapter.version")
        if version.state is not AdapterState.ACTIVE:
            problem = f"{version.version_name}: {version.state.value}, only an active version can be current"
            raise FailedPrecondition("ADAPTER_INVALID", problem)
        return version

    async def DeleteAdapter(self, request: DeleteAdapterRequest, context: Context) -> Adapter:  # noqa: N802
        return await self._once.run("DeleteAdapter", request.request_id, lambda: self._delete(request))

    async def _delete(self, request: DeleteAdapterRequest) -> Adapter:
        seconds = wait_seconds(request)
        version = self._get(request.name)
        _check_etag(version, request.etag)
        try:
            versions = await self._records.change(
                version.key.name,
                lambda registry: registry.delete(request.name),
                lambda: _check_etag(self._get(request.name), request.etag),
            )
        except AdapterConflict as error:
            raise FailedPrecondition("ADAPTER_IS_CURRENT", str(error)) from error
        keys = [other.key for other in versions]
        await wait_until(lambda: not any(self._find(key) for key in keys), self._registry.subscribe, seconds)
        with suppress(Unavailable):  # a restart goes on with what is being deleted
            await self._records.saved()
        return self._messages.of(
            self._find(version.key) or next(other for other in versions if other.key == version.key)
        )

    async def LoadAdapter(self, request: LoadAdapterRequest, context: Context) -> Adapter:  # noqa: N802
        async def load() -> Adapter:
            residency = _residency(request.residency, Residency.DEVICE, (Residency.HOST, Residency.DEVICE))
            version = self._usable(request.name)
            loading = self._deployer.load(version, residency)
            done, _ = await asyncio.wait({loading}, timeout=wait_seconds(request))
            for task in done:
                task.result()  # raises what kept it from getting there
            return self._messages.of(self._get(request.name))

        return await self._once.run("LoadAdapter", request.request_id, load)

    async def UnloadAdapter(self, request: UnloadAdapterRequest, context: Context) -> Adapter:  # noqa: N802
        async def unload() -> Adapter:
            residency = _residency(request.residency, Residency.DISK, (Residency.DISK, Residency.HOST))
            version = self._usable(request.name)
            if version.spec.pinned:
                raise FailedPrecondition("ADAPTER_PINNED", f"adapter {version.version_name} is pinned; unpin it first")
            unloading = self._deployer.unload(version, residency)
            if unloading is not None:
                await asyncio.wait({unloading}, timeout=wait_seconds(request))
            return self._messages.of(self._get(request.name))

        return await self._once.run("UnloadAdapter", request.request_id, unload)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _get(self, name: str, field: str = "name") -> AdapterVersion:
        """Raises InvalidRequest, NotFound."""
        try:
            return self._registry.get(adapter_name(name, field))
        except AdapterNotFound as error:
            raise unknown_adapter(name, error) from error

    def _usable(self, name: str) -> AdapterVersion:
        """Raises InvalidRequest, NotFound, and FailedPrecondition for a version that cannot be used."""
        version = self._get(name)
        if version.state is AdapterState.FAILED:
            raise FailedPrecondition(version.reason, "; ".join(version.problems))
        if version.state is AdapterState.DELETING:
            raise NotFound("ADAPTER_NOT_FOUND", name, f"adapter {version.version_name} is being deleted")
        return version

    def _find(self, key: AdapterKey) -> AdapterVersion | None:
        try:
            return self._registry.get(full_name(key))
        except AdapterNotFound:
            return None

    async def _wait_while(self, version: AdapterVersion, state: AdapterState, seconds: float) -> AdapterVersion:
        def is_over() -> bool:
            now = self._find(version.key)
            return now is None or now.state is not state or self._messages.stuck(now) is not None

        def subscribe(changed: Callable[[object], None]) -> Callable[[], None]:
            leave_registry, leave_host = self._registry.subscribe(changed), self._host.subscribe(changed)

            def leave() -> None:
                leave_registry()
                leave_host()

            return leave

        await wait_until(is_over, subscribe, seconds)
        return self._find(version.key) or version


def _updated(registry: AdapterRegistry, version: AdapterVersion, wanted: Adapter, fields: set[str]) -> AdapterVersion:
    """The version with its new fields. Raises FailedPrecondition."""
    name = version.full_name
    if "pinned" in fields:
        version = registry.update(name, pinned=wanted.pinned)
    if "version" in fields:
        try:
            version = registry.set_current(name)
        except AdapterConflict as error:  # it has failed, or is being deleted, since it was looked at
            raise FailedPrecondition("ADAPTER_INVALID", str(error)) from error
    if "labels" in fields:
        version = registry.update(name, labels=wanted.labels)
    if "default_constraint" in fields:
        version = registry.update(name, default_constraint=_saved(wanted.default_constraint))
    return version


def _saved(constraint: Constraint) -> bytes:
    return constraint.SerializeToString(deterministic=True)


def _fields_to_change(mask: FieldMask) -> set[str]:
    """Raises InvalidRequest."""
    unknown = [path for path in mask.paths if path not in UPDATABLE]
    if unknown:
        raise InvalidRequest.at("update_mask", f"{unknown[0][:80]!r} cannot be changed; {', '.join(UPDATABLE)} can")
    return set(mask.paths) or {"labels", "pinned"}


def _check_etag(version: AdapterVersion, etag: str) -> None:
    if etag and etag != version.etag:
        raise Aborted(f"{version.version_name} has changed since it was read; its etag is {version.etag} now")


def _residency(wanted: int, default: Residency, possible: tuple[Residency, ...]) -> Residency:
    """Raises InvalidRequest."""
    if wanted == ADAPTER_RESIDENCY_UNSPECIFIED:
        return default
    if wanted not in possible:
        names = " or ".join(AdapterResidency.Name(RESIDENCIES[residency]) for residency in possible)
        raise InvalidRequest.at("residency", f"must be {names}")
    return Residency(wanted)
