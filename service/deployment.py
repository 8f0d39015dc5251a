"""Brings registered adapters onto the engines, and away from them again.

The registry says what exists, the host which engines there are; here the one is made to follow the other: a new version
is checked, read by its engine and then active; an engine that starts again gets its adapters back; a version that is no
longer current leaves the engine's memory; one that is being deleted goes once nobody uses it.
"""

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import AdapterConflict, AdapterNotFound, AdapterRejected, SourceNotAllowed
from adapters.key import AdapterKey
from adapters.registry import (
    AdapterChange,
    AdapterInfo,
    AdapterRegistry,
    AdapterSpec,
    AdapterState,
    AdapterVersion,
    resource_name,
)
from adapters.source import AdapterDescription, AdapterSource, describe, digest
from engine.client import EngineClient
from engine.messages import AdapterLoaded
from service.config import AdapterConfig
from service.errors import AlreadyExists, FailedPrecondition, InvalidRequest, LoraplexError, PermissionDenied
from service.hosting import HostedModel, ModelHost

logger = logging.getLogger(__name__)

READERS = 2  # adapters whose files are checked at once


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of a version: where they are, and what they say."""

    directory: Path
    digest: str
    description: AdapterDescription | None  # None: they are no adapter that can be served, and
    problems: tuple[str, ...] = ()  # these are the reasons,
    reason: str = "ADAPTER_INVALID"  # or ADAPTER_RANK_TOO_HIGH


class AdapterDeployer:
    """For one event loop. Long work runs in threads and in tasks of its own."""

    def __init__(self, registry: AdapterRegistry, source: AdapterSource, models: ModelHost) -> None:
        self._registry = registry
        self._source = source
        self._models = models
        self._files: dict[AdapterKey, AdapterFiles] = {}
        self._current: dict[str, AdapterKey] = {}  # by key name: what the bare name last meant
        self._clients: dict[str, EngineClient] = {}  # by model: the life of its engine that has been given adapters
        self._removing: set[AdapterKey] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # Threads of their own: reading gigabytes must not hold up the prompts that are tokenised in the common ones.
        self._readers = ThreadPoolExecutor(READERS, "adapter-inspect")
        registry.subscribe(self._adapter_changed)
        models.subscribe(self._model_changed)

    def directory(self, version: AdapterVersion) -> str:
        """Where a version's files are, for its engine to read."""
        return str(self._files[version.key].directory)

    async def inspect(self, reference: str, base_model: str) -> AdapterFiles:
        """Check files as far as can be without the model itself.

        Raises PermissionDenied (SOURCE_NOT_ALLOWED), NotFound for the model, and FailedPrecondition (ADAPTER_INVALID)
        for files so wrong that they have not even a digest.
        """
        limits = self._models.get(base_model).supervisor.limits
        try:
            files = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, reference)
        except SourceNotAllowed as error:
            raise PermissionDenied(str(error), "SOURCE_NOT_ALLOWED") from error
        except (AdapterRejected, OSError) as error:
            raise FailedPrecondition("ADAPTER_INVALID", f"source {reference!r}: {error}") from error
        if files.description is not None and limits is not None and files.description.rank > limits.max_adapter_rank:
            problem = f"rank {files.description.rank}: model {base_model!r} takes at most {limits.max_adapter_rank}"
            return AdapterFiles(files.directory, files.digest, None, (problem,), "ADAPTER_RANK_TOO_HIGH")
        return files

    async def validate(self, tenant: str, adapter_id: str, base_model: str, files: AdapterFiles) -> AdapterLoaded:
        """Have the model's engine read and bind an adapter that is not registered, and forget it again.

        Raises FailedPrecondition (ADAPTER_INVALID, ADAPTER_RANK_TOO_HIGH), and what `ModelHost.serving` raises.
        """
        if files.description is None:
            raise FailedPrecondition(files.reason, "; ".join(files.problems))
        client = self._models.serving(base_model).client
        key = AdapterKey(f"{tenant}/{adapter_id}", files.digest)
        try:
            loaded = await client.load_adapter(key, str(files.directory))
        except AdapterRejected as error:
            raise FailedPrecondition("ADAPTER_INVALID", str(error)) from error
        if key not in self._files:
            self._spawn(_unload(client, key))
        return loaded

    def create(self, tenant: str, adapter_id: str, spec: AdapterSpec, files: AdapterFiles) -> AdapterVersion:
        """Register a version; it is LOADING until its engine has read it. Known already: it is returned as it is.

        Raises AlreadyExists, InvalidRequest for an id that cannot be.
        """
        try:
            version = self._registry.register(tenant, adapter_id, files.digest, spec)
        except AdapterConflict as error:
            name = f"tenants/{tenant}/adapters/{adapter_id}@{files.digest[:12]}"
            raise AlreadyExists("Adapter", name, str(error)) from error
        except AdapterNotFound as error:
            raise InvalidRequest.at("adapter_id", str(error)) from error
        if version.state is not AdapterState.LOADING:
            return version
        self._files[version.key] = files
        if files.description is None:
            return self._registry.fail(version.key, list(files.problems))
        client = self._models.get(spec.base_model).client
        if client is not None:  # else when the model is loaded
            self._deploy(client, version)
        return version

    async def create_configured(self, adapter: AdapterConfig) -> None:
        """Register an adapter of the configuration file. What is wrong with it is logged: the others go on."""
        spec = AdapterSpec(base_model=adapter.model, source=adapter.source, labels=adapter.labels)
        try:
            files = await self.inspect(adapter.source, adapter.model)
            version = self.create(adapter.tenant, adapter.adapter_id, spec, files)
        except LoraplexError as error:
            logger.error("adapter %s of the configuration is not registered: %s", adapter.name, error)
            return
        if version.state is AdapterState.FAILED:
            logger.error("adapter %s of the configuration is not valid: %s", adapter.name, "; ".join(version.problems))

    def load(self, version: AdapterVersion) -> "asyncio.Task[None]":
        """Begin to bring a version into the memory of its engine. Raises what `ModelHost.serving` raises."""
        return self._deploy(self._models.serving(version.spec.base_model).client, version)

    def unload(self, version: AdapterVersion) -> "asyncio.Task[None] | None":
        """Begin to free the memory of a version, once no running request uses it. None: it has no engine anyway."""
        client = self._models.get(version.spec.base_model).client
        return None if client is None else self._spawn(_unload(client, version.key))

    def reason(self, version: AdapterVersion) -> str:
        """The reason, as in ErrorReason, for which a version has FAILED."""
        return self._files[version.key].reason

    async def close(self) -> None:
        """Wait for nothing any more."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _read(self, reference: str) -> AdapterFiles:
        directory = self._source.resolve(reference)
        try:
            description = describe(directory)
        except AdapterRejected as error:
            return AdapterFiles(directory, digest(directory), None, tuple(error.problems))
        return AdapterFiles(directory, description.digest, description)

    def _deploy(self, client: EngineClient, version: AdapterVersion) -> "asyncio.Task[None]":
        """Say so to the engine now, so that whatever follows finds the adapter registered; take its answer later."""
        loading = client.start_loading(version.key, self.directory(version))
        return self._spawn(self._take_answer(version.key, loading))

    async def _take_answer(self, key: AdapterKey, loading: "asyncio.Future[AdapterLoaded]") -> None:
        with suppress(AdapterNotFound):  # it was deleted meanwhile
            try:
                loaded = await asyncio.shield(loading)
            except AdapterRejected as error:
                self._registry.fail(key, error.problems)
            except LoraplexError:
                return  # the engine ended; its next life is given the adapter again
            else:
                if self._version(key).state is AdapterState.LOADING:
                    self._registry.activate(key, adapter_info(self._files[key], loaded))

    def _model_changed(self, model: HostedModel) -> None:
        """Give a new life of an engine its adapters."""
        client = model.client
        if client is None or self._clients.get(model.name) is client:
            return
        self._clients[model.name] = client
        for version in self._registry.list_versions(base_model=model.name, include_versions=True):
            if version.state in (AdapterState.LOADING, AdapterState.ACTIVE):
                self._deploy(client, version)

    def _adapter_changed(self, change: AdapterChange) -> None:
        version = change.version
        key = version.key
        if version.current and self._current.get(key.name) != key:
            before = self._current.get(key.name)
            self._current[key.name] = key
            if before is not None:
                self._retire(before)
        if version.state is AdapterState.DELETING and not version.num_requests and key not in self._removing:
            self._removing.add(key)
            self._spawn(self._remove(version))

    def _retire(self, key: AdapterKey) -> None:
        """Free the memory of a version that the name has left. A request for that very version loads it again."""
        version = self._version(key)
        if version.state is AdapterState.ACTIVE and not version.spec.pinned:
            self.unload(version)

    async def _remove(self, version: AdapterVersion) -> None:
        client = self._models.get(version.spec.base_model).client
        if client is not None:
            await _unload(client, version.key)
        self._registry.remove(version.key)
        self._removing.discard(version.key)
        self._files.pop(version.key, None)
        if self._current.get(version.key.name) == version.key:
            del self._current[version.key.name]

    def _version(self, key: AdapterKey) -> AdapterVersion:
        return self._registry.get(f"{resource_name(key)}@{key.digest}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a change of the adapters could not be completed", exc_info=error)


def adapter_info(files: AdapterFiles, loaded: AdapterLoaded) -> AdapterInfo:
    """What the files and the engine say of a version together."""
    assert files.description is not None
    ranks = files.description.module_ranks
    return AdapterInfo(
        rank=loaded.rank,
        size_bytes=loaded.size_bytes,
        target_modules=tuple(loaded.target_modules),
        alpha=files.description.config.alpha,
        module_ranks=ranks if len(set(ranks.values())) > 1 else {},
        warnings=(*files.description.config.warnings, *loaded.warnings),
    )


async def _unload(client: EngineClient, key: AdapterKey) -> None:
    try:
        await client.unload_adapter(key)
    except LoraplexError:
        return  # the engine ended, and its memory with it
