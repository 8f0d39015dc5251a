"""Brings registered adapters onto the engines, and away from them again.

The registry says which versions exist, the host which engines run. The deployer makes the engines follow: a new version
is checked, read by its engine and then active; a restarted engine gets its adapters back; a version that is no longer
current leaves the engine's memory; a deleted version goes once no request uses it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from loraplex_adapters.errors import COLD, UNREADABLE, AdapterConflict, AdapterNotFound, AdapterRejected
from loraplex_adapters.files.source import AdapterDescription
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.registry import AdapterChange, AdapterRecord, AdapterRegistry, ChangeKind
from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import AdapterInfo, AdapterSpec, AdapterState, AdapterVersion, full_name
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import AdapterLoaded
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.adapters.library import AdapterFiles, AdapterLibrary
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.admission.tenants import Tenants
from loraplex_service.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    LoraplexError,
    PermissionDenied,
    Unavailable,
    unknown_adapter,
)
from loraplex_service.models.host import HostedModel, ModelHost
from loraplex_service.state import StateFile
from loraplex_service.text import AdapterText

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATE_KIND = "adapter"
CONFIGURED_KIND = "configured"  # by name of an adapter of the configuration: the digest that it had


class AdapterDeployer:
    """Makes engines follow the registry. For one event loop; long work runs in threads and in tasks of its own."""

    def __init__(
        self,
        registry: AdapterRegistry,
        library: AdapterLibrary,
        models: ModelHost,
        state: StateFile,
        tenants: Tenants,
        texts: AdapterTexts,
    ) -> None:
        """Restore the registry from the saved state. `reconcile` makes the rest follow."""
        self._registry = registry
        self._library = library
        self._models = models
        self._state = state
        self._tenants = tenants
        self._texts = texts
        self._descriptions: dict[AdapterKey, AdapterDescription] = {}  # of versions that are LOADING
        self._current: dict[str, AdapterKey] = {}  # by key name: what the bare name last meant
        self._clients: dict[str, EngineClient] = {}  # by model: the life of its engine that has been given adapters
        self._removing: set[AdapterKey] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        damaged = [name for name, body in state.read(STATE_KIND).items() if not self._restore(name, body)]
        self._knows_all = not damaged  # else files might go that belong to what cannot be read
        self._current = {v.key.name: v.key for v in registry.list_versions(include_versions=True) if v.current}
        registry.subscribe(self._adapter_changed)
        models.subscribe(self._model_changed)

    def directory(self, version: AdapterVersion) -> str:
        """The directory of a version's files, for its engine to read."""
        return str(self._library.directory(version))

    async def reconcile(self) -> None:
        """Finish interrupted work after a restart, and check changed files and trust again.

        Call it before engines start, so that they get only versions that this configuration accepts.
        """
        versions = self._registry.list_versions(include_versions=True)
        leaving = [version for version in versions if version.state is AdapterState.DELETING]
        staying = [v for v in versions if v.state is not AdapterState.DELETING and not v.is_missing]
        kept = {version.key.digest for version in staying if not version.directory}
        await self._library.sweep(kept if self._knows_all else None)
        for version in leaving:
            self._begin_removing(version)
        changed = {version.key for version in await self._library.changed(staying)}
        for version in staying:
            if self._models.find(version.spec.base_model) is None:
                problem = f"model {version.spec.base_model!r} is not configured any more"
                self._registry.fail(version.key, [problem], "MODEL_UNLOADED")
            elif (untrusted := await self._untrusted(version)) is not None:
                logger.warning("adapter %s is not served any more: %s", version.version_name, untrusted)
                self._registry.fail(version.key, [untrusted.message], untrusted.reason)
            elif version.state is not AdapterState.ACTIVE or version.key in changed:
                self._spawn(self._recheck(self._registry.recheck(version.key)))

    def check_rank(self, files: AdapterFiles, base_model: str) -> AdapterFiles:
        """Return the files, with a problem added if the rank is above the model's limit.

        Raises NotFound for the model.
        """
        limits = self._models.get(base_model).supervisor.limits
        if files.description is None or limits is None or files.description.rank <= limits.max_adapter_rank:
            return files
        problem = (
            f"rank {files.description.rank}: model {base_model!r} takes at most {limits.max_adapter_rank} "
            "(max_adapter_rank)"
        )
        return replace(files, description=None, problems=(problem,), reason="ADAPTER_RANK_TOO_HIGH")

    async def validate(self, tenant: str, adapter_id: str, base_model: str, files: AdapterFiles) -> AdapterInfo:
        """Have the model's engine read and bind an adapter that is not registered, and forget it again.

        Raises FailedPrecondition (ADAPTER_INVALID, ADAPTER_RANK_TOO_HIGH), what `ModelHost.serving` raises, and what
        `AdapterTexts.read` does.
        """
        description = files.description
        if description is None:
            raise FailedPrecondition(files.reason, "; ".join(files.problems))
        model = self._models.serving(base_model)
        key = AdapterKey(f"{tenant}/{adapter_id}", files.digest)
        try:
            loaded = await model.client.adapters.load(key, str(files.directory))
        except AdapterRejected as error:
            raise FailedPrecondition(error.reason, str(error)) from error
        if not self._is_registered(key):
            self._spawn(_unload(model.client, key))
        text = AdapterText(model.tokenizer)
        if description.text_digest:
            text = await self._texts.read(str(key), files.directory, description.text_digest, model.tokenizer)
        return adapter_info(description, loaded, _text_warnings(text, description))

    async def create_saved(
        self, tenant: str, adapter_id: str, spec: AdapterSpec, files: AdapterFiles, check: Callable[[], None]
    ) -> AdapterVersion:
        """Do as `create`, once the change is saved. `check` runs when no other change is under way, and raises
        objections.

        Raises Unavailable (STATE_UNWRITABLE), too.
        """
        self._library.keep(files)  # before the state says that they are there
        try:
            return await self.change(
                f"{tenant}/{adapter_id}",
                lambda registry: _register(registry, tenant, adapter_id, spec, files),
                check,
                lambda: self.create(tenant, adapter_id, spec, files),
            )
        except LoraplexError:
            self._spawn(self._library.remove(files.digest, lambda: not self._is_kept(files.digest)))
            raise

    def create(self, tenant: str, adapter_id: str, spec: AdapterSpec, files: AdapterFiles) -> AdapterVersion:
        """Register a version. It is LOADING until its engine has read it. A known version is returned as it is.

        Raises AlreadyExists, and InvalidRequest for a malformed id.
        """
        try:
            self._library.keep(files)
            version = _register(self._registry, tenant, adapter_id, spec, files)
        except AlreadyExists:
            self._spawn(self._library.remove(files.digest, lambda: not self._is_kept(files.digest)))
            raise
        if version.state is not AdapterState.LOADING:
            return version
        self._check(version, files)
        return self._version(version.key)

    async def change(
        self,
        key_name: str,
        change: Callable[[AdapterRegistry], T],
        check: Callable[[], None],
        make: Callable[[], T] | None = None,
    ) -> T:
        """Save a change of the registry, then make it. Changes run one after the other, even if their caller goes away.

        `check` runs when no other change is under way, and raises objections. `make`: the change with all that it
        takes; None: the registry's change alone. Raises Unavailable (STATE_UNWRITABLE), what these two raise, and
        NotFound if the version is gone by the time that the change is saved; the change is then not made.
        """
        try:
            return await self._state.change(
                lambda: self._change(key_name, change, check, make or (lambda: change(self._registry)))
            )
        except AdapterNotFound as error:
            tenant, _, adapter_id = key_name.partition("/")
            raise unknown_adapter(f"tenants/{tenant}/adapters/{adapter_id}", error) from error

    async def create_configured(self, adapter: AdapterConfig) -> None:
        """Register an adapter of the configuration file. Errors are logged, and the other adapters go on."""
        spec = AdapterSpec(
            base_model=adapter.model,
            source=adapter.source,
            labels=adapter.labels,
            pinned=adapter.pinned,
            residency=Residency[adapter.residency.upper()],
        )
        try:
            async with self._library.find(adapter.source) as files:
                tenant = self._tenants.get(adapter.tenant)
                await self._library.check_trust(tenant, files.digest, files.directory)
                # What the configuration said already at the last start was perhaps changed by hand since.
                configured = self._state.read(CONFIGURED_KIND).get(adapter.name)
                spec = replace(spec, make_current=configured != files.digest.encode())
                version = self.create(adapter.tenant, adapter.adapter_id, spec, self.check_rank(files, adapter.model))
                self._state.put(CONFIGURED_KIND, adapter.name, files.digest.encode())
        except LoraplexError as error:
            problem = error.message
            if error.reason == "SOURCE_NOT_ALLOWED":  # which does not say where, since callers may ask
                problem += f"; {adapter.source} was looked for under {self._library.where}"
            logger.error("adapter %s of the configuration is not registered: %s", adapter.name, problem)
            self._registry.register_missing(adapter.tenant, adapter.adapter_id, spec, [problem], error.reason)
            return
        if version.state is AdapterState.FAILED:
            logger.error("adapter %s of the configuration is not valid: %s", adapter.name, "; ".join(version.problems))

    def load(self, version: AdapterVersion, residency: Residency = Residency.HOST) -> "asyncio.Task[None]":
        """Begin to bring a version into the memory of its engine, or on to the device.

        Raises what `ModelHost.serving` raises. The task raises FailedPrecondition if the adapter cannot get to the
        device, and Unavailable (ADAPTER_COLD) if it is unloaded meanwhile.
        """
        client = self._models.serving(version.spec.base_model).client
        loading = self._deploy(client, version)
        return loading if residency is Residency.HOST else self._spawn(self._bring(client, version))

    def prefetch(self, version: AdapterVersion) -> None:
        """Load a version into host memory ahead of its requests, if its model runs and the version is not there."""
        client = self._client(version)
        if client is not None and version.key not in client.adapters.loaded and version.state is AdapterState.ACTIVE:
            self._deploy(client, version)

    def unload(self, version: AdapterVersion, residency: Residency = Residency.DISK) -> "asyncio.Task[None] | None":
        """Begin to free the memory of a version, or with HOST its room on the device, once no running request uses it.

        Returns None if the model has no engine.
        """
        client = self._client(version)
        if client is None:
            return None
        leaving = (
            _unload(client, version.key) if residency is Residency.DISK else client.adapters.leave_device(version.key)
        )
        return self._spawn(leaving)

    async def pin(self, version: AdapterVersion, pinned: bool) -> None:
        """Have the engine keep a version on the device, or no longer. For later lives of the engine, the
        registry must be told as well.

        Raises FailedPrecondition (ADAPTER_PIN_LIMIT, or what is wrong with the adapter), and Unavailable (ADAPTER_COLD)
        if it is unloaded meanwhile.
        """
        client = self._client(version)
        if client is not None and version.state is AdapterState.ACTIVE:
            await self._pin(client, version, pinned)

    async def close(self) -> None:
        """Cancel all waiting work."""
        await self._library.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _change(
        self, key_name: str, change: Callable[[AdapterRegistry], T], check: Callable[[], None], make: Callable[[], T]
    ) -> T:
        check()
        record = self._registry.foresee(key_name, change)
        await self._state.save(STATE_KIND, key_name, None if record is None else msgspec.json.encode(record))
        try:
            made = make()
        finally:
            self._note(key_name)  # also what has happened by itself meanwhile
        with suppress(Unavailable):  # the change itself is on the disk
            await self._state.saved()
        return made

    def _note(self, key_name: str) -> None:
        record = self._registry.record(key_name)
        if record is None:
            self._state.delete(STATE_KIND, key_name)
        else:
            self._state.put(STATE_KIND, key_name, msgspec.json.encode(record))

    def _check(self, version: AdapterVersion, files: AdapterFiles) -> None:
        """Pass a LOADING version whose files have been checked on to its engine, which decides."""
        if files.description is None:
            self._registry.fail(version.key, files.problems, files.reason)
            return
        self._descriptions[version.key] = files.description
        client = self._client(version)
        if client is not None:  # else when the model is loaded
            self._deploy(client, version)

    def _restore(self, name: str, body: bytes) -> bool:
        """Restore one saved record.

        False: it could not be read; its adapter is FAILED and the record stays as it is.
        """
        try:
            self._registry.restore(name, msgspec.json.decode(body, type=AdapterRecord))
        except (msgspec.MsgspecError, ValueError) as error:
            problem = self._state.set_aside(STATE_KIND, name, body, error)
            with suppress(AdapterNotFound):  # not even its name can be one
                tenant, _, adapter_id = name.partition("/")
                spec = AdapterSpec(base_model="", source="")
                self._registry.register_missing(tenant, adapter_id, spec, [problem], "ADAPTER_UNREADABLE")
            return False
        return True

    async def _untrusted(self, version: AdapterVersion) -> PermissionDenied | None:
        """The error that says why the tenant does not accept a version now; None: it accepts the version."""
        tenant = self._tenants.get(version.key.name.partition("/")[0])
        try:
            await self._library.check_trust(tenant, version.key.digest, self._library.directory(version))
        except PermissionDenied as error:
            return error
        return None

    async def _recheck(self, version: AdapterVersion) -> None:
        with suppress(AdapterNotFound):  # it was deleted meanwhile
            try:
                files = await self._library.recheck(version)
            except FailedPrecondition as error:
                self._registry.fail(version.key, [error.message])
                return
            if self._version(version.key).state is AdapterState.LOADING:
                self._check(version, self.check_rank(files, version.spec.base_model))

    def _deploy(self, client: EngineClient, version: AdapterVersion) -> "asyncio.Task[None]":
        """Send the load to the engine now, so that later messages find the adapter registered; take the answer
        later.
        """
        loading = client.adapters.start_loading(version.key, self.directory(version))
        return self._spawn(self._take_answer(version.key, loading))

    async def _take_answer(self, key: AdapterKey, loading: "asyncio.Future[AdapterLoaded]") -> None:
        with suppress(AdapterNotFound):  # it was deleted meanwhile
            try:
                loaded = await asyncio.shield(loading)
            except AdapterRejected as error:
                if error.reason != UNREADABLE or self._version(key).state is AdapterState.LOADING:
                    self._registry.fail(key, error.problems, error.reason)
                self._descriptions.pop(key, None)
            except LoraplexError:
                return  # the engine ended; its next life is given the adapter again
            else:
                version = self._version(key)
                warnings = await self._warnings_of_text(version)
                if self._version(key).state is AdapterState.LOADING:
                    info = adapter_info(self._descriptions.pop(key), loaded, warnings)
                    self._bring_closer(self._registry.activate(key, info))

    async def _warnings_of_text(self, version: AdapterVersion) -> tuple[str, ...]:
        """Warnings about the tokenizer and template of a LOADING version."""
        model = self._models.find(version.spec.base_model)
        if version.state is not AdapterState.LOADING or model is None or model.tokenizer is None:
            return ()
        description, text = self._descriptions[version.key], AdapterText(model.tokenizer)
        if version.text_digest:
            try:
                text = await self._texts.text(version, model.tokenizer)
            except Unavailable as error:
                return (error.message,)
        return _text_warnings(text, description)

    def _model_changed(self, model: HostedModel) -> None:
        """Give a new life of an engine its adapters."""
        client = model.client
        if client is None or self._clients.get(model.name) is client:
            return
        self._clients[model.name] = client
        client.adapters.moved = self._registry.moved
        versions = self._registry.list_versions(base_model=model.name, include_versions=True)
        for version in versions:
            if version.state is AdapterState.LOADING and version.key in self._descriptions:
                self._deploy(client, version)
        for version in _worth_having(versions, model.config.adapter_host_bytes):
            self._deploy(client, version)
            self._bring_closer(version)

    def _bring_closer(self, version: AdapterVersion) -> None:
        """Bring an active version to the tier in which it belongs ahead of its requests."""
        client = self._client(version)
        if client is None:
            return
        if version.spec.pinned:
            self._spawn(self._pin_again(client, version))
        elif version.spec.residency is Residency.DEVICE:
            self._spawn(self._bring(client, version))

    async def _bring(self, client: EngineClient, version: AdapterVersion) -> None:
        try:
            await client.adapters.bring_to_device(version.key, self.directory(version))
        except AdapterRejected as error:
            raise _rejected(version, error) from error

    async def _pin(self, client: EngineClient, version: AdapterVersion, pinned: bool) -> None:
        try:
            if pinned:
                await client.adapters.load(version.key, self.directory(version))
            await client.adapters.pin(version.key, pinned)
        except AdapterRejected as error:
            raise _rejected(version, error) from error
        except AdapterConflict as error:
            raise FailedPrecondition("ADAPTER_PIN_LIMIT", str(error)) from error

    async def _pin_again(self, client: EngineClient, version: AdapterVersion) -> None:
        """Pin a version again in a new engine. If that fails, the registry no longer says that it is pinned."""
        try:
            await self._pin(client, version, True)
        except FailedPrecondition as error:
            logger.warning("adapter %s is not pinned any more: %s", version.version_name, error)
            with suppress(AdapterNotFound):
                self._registry.update(version.full_name, pinned=False)

    def _adapter_changed(self, change: AdapterChange) -> None:
        if change.kind is ChangeKind.MOVED:
            return
        version = change.version
        key = version.key
        self._note(key.name)
        if version.current and self._current.get(key.name) != key:
            before = self._current.get(key.name)
            self._current[key.name] = key
            if before is not None:
                self._retire(before)
        if version.state is AdapterState.DELETING and not version.num_requests:
            self._begin_removing(version)

    def _begin_removing(self, version: AdapterVersion) -> None:
        if version.key not in self._removing:
            self._removing.add(version.key)
            self._spawn(self._remove(version))

    def _retire(self, key: AdapterKey) -> None:
        """Free the memory of a version that its alias has left. A request for that version loads it again."""
        version = self._version(key)
        if version.state is AdapterState.ACTIVE and not version.spec.pinned:
            self.unload(version)

    async def _remove(self, version: AdapterVersion) -> None:
        client = self._client(version)
        if client is not None:
            await _unload(client, version.key)
        self._registry.remove(version.key)
        self._removing.discard(version.key)
        self._descriptions.pop(version.key, None)
        if self._current.get(version.key.name) == version.key:
            del self._current[version.key.name]
        if not version.directory:
            await self._state.saved()  # as long as it is known after a restart, its files must be there
            await self._library.remove(version.key.digest, lambda: not self._is_kept(version.key.digest))

    def _is_kept(self, digest: str) -> bool:
        """Whether any version uses the server's own copy of files with this digest."""
        versions = self._registry.list_versions(include_versions=True)
        return any(version.key.digest == digest and not version.directory for version in versions)

    def _is_registered(self, key: AdapterKey) -> bool:
        try:
            self._version(key)
        except AdapterNotFound:
            return False
        return True

    def _version(self, key: AdapterKey) -> AdapterVersion:
        return self._registry.get(full_name(key))

    def _client(self, version: AdapterVersion) -> EngineClient | None:
        model = self._models.find(version.spec.base_model)
        return None if model is None else model.client

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, LoraplexError):
                logger.warning("a change of the adapters could not be completed: %s", error)
                return
            logger.error("a change of the adapters could not be completed", exc_info=error)


def _text_warnings(text: AdapterText, description: AdapterDescription) -> tuple[str, ...]:
    """Warnings about the parts of an adapter's tokenizer and template that are not used as they were trained."""
    trained = {token_id for ids in description.config.trained_tokens.values() for token_id in ids}
    unnamed = sorted(token_id for token_id in trained if token_id >= text.tokenizer.num_token_ids)
    if not unnamed:
        return text.warnings
    listed = ", ".join(map(str, unnamed[:5])) + (" …" if len(unnamed) > 5 else "")
    problem = f"tokens {listed} were trained, and no tokenizer has them: keep tokenizer.json beside the weights"
    return (*text.warnings, problem)


def _register(
    registry: AdapterRegistry, tenant: str, adapter_id: str, spec: AdapterSpec, files: AdapterFiles
) -> AdapterVersion:
    """Register a version. Raises AlreadyExists, and InvalidRequest for a malformed id."""
    directory, fingerprint = ("", "") if files.gathered else (str(files.directory), files.fingerprint)
    text_digest = files.description.text_digest if files.description is not None else ""
    try:
        return registry.register(tenant, adapter_id, files.digest, spec, directory, fingerprint, text_digest)
    except AdapterConflict as error:
        name = f"tenants/{tenant}/adapters/{adapter_id}@{files.digest[:12]}"
        raise AlreadyExists("Adapter", name, str(error)) from error
    except AdapterNotFound as error:
        raise InvalidRequest.at("adapter_id", str(error)) from error


def adapter_info(description: AdapterDescription, loaded: AdapterLoaded, warnings: Sequence[str] = ()) -> AdapterInfo:
    """Combine what is known of a version from its files and from the engine."""
    ranks = description.module_ranks
    return AdapterInfo(
        rank=loaded.rank,
        size_bytes=loaded.size_bytes,
        target_modules=tuple(loaded.target_modules),
        alpha=description.config.alpha,
        module_ranks=ranks if len(set(ranks.values())) > 1 else {},
        warnings=(*loaded.warnings, *warnings),
    )


def _worth_having(versions: list[AdapterVersion], budget_bytes: int) -> list[AdapterVersion]:
    """The active versions that a new engine loads ahead of their requests: those that belong on the device, then the
    most recently used, as many as fit."""
    found: list[AdapterVersion] = []
    active = [version for version in versions if version.state is AdapterState.ACTIVE]

    def worth(version: AdapterVersion) -> tuple[bool, Residency, float]:
        return version.spec.pinned, version.spec.residency, version.last_use_time or version.create_time

    for version in sorted(active, key=worth, reverse=True):
        budget_bytes -= version.info.size_bytes if version.info is not None else 0
        if budget_bytes < 0:
            break
        found.append(version)
    return found


def _rejected(version: AdapterVersion, error: AdapterRejected) -> LoraplexError:
    message = f"adapter {version.version_name}: {error}"
    return Unavailable(COLD, message) if error.reason == COLD else FailedPrecondition(error.reason, message)


async def _unload(client: EngineClient, key: AdapterKey) -> None:
    try:
        await client.adapters.unload(key)
    except LoraplexError:
        return  # the engine ended, and its memory with it
