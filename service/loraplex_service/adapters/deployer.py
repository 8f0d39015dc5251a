"""Brings registered adapters onto the engines, and away from them again.

The registry says which versions exist, the host which engines run. The deployer makes the engines follow: a new version
is read by its engine and then active; a restarted engine gets its adapters back; a version that is no longer current
leaves the engine's memory; a deleted version goes once no request uses it.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from loraplex_adapters.errors import COLD, UNREADABLE, AdapterConflict, AdapterNotFound, AdapterRejected
from loraplex_adapters.files.source import AdapterDescription
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterChange, ChangeKind
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import AdapterInfo, AdapterState, AdapterVersion, full_name
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import AdapterFacts
from loraplex_engine.link.uploads import FollowedUpload
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.library import AdapterFiles, AdapterLibrary
from loraplex_service.adapters.reading_ahead import ReadingAhead
from loraplex_service.adapters.records import AdapterRecords
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.admission.tenants import Tenant
from loraplex_service.errors import FailedPrecondition, LoraplexError, Unavailable
from loraplex_service.models.host import HostedModel, ModelHost
from loraplex_service.telemetry.series import Histogram
from loraplex_service.text import AdapterText

logger = logging.getLogger(__name__)

MAX_MODULE_RANKS = 4096  # that are told: the contract has no more


class AdapterDeployer:
    """Makes engines follow the registry. For one event loop; long work runs in threads and in tasks of its own."""

    def __init__(
        self,
        registry: AdapterRegistry,
        library: AdapterLibrary,
        models: ModelHost,
        records: AdapterRecords,
        texts: AdapterTexts,
        work: BackgroundWork,
        loads: Histogram,
    ) -> None:
        """`loads`: takes the seconds of every load into host memory, by model."""
        self._registry = registry
        self._library = library
        self._models = models
        self._records = records
        self._texts = texts
        self._work = work
        self._loads = loads
        self._descriptions: dict[AdapterKey, AdapterDescription] = {}  # of versions that are LOADING
        self._clients: dict[str, EngineClient] = {}  # by model: the life of its engine that has been given adapters
        self._removing: set[AdapterKey] = set()
        versions = registry.list_versions(include_versions=True)
        self._current = {v.key.name: v.key for v in versions if v.current}  # by key name: what the bare name last meant
        registry.subscribe(self._adapter_changed)
        models.subscribe(self._model_changed)

    def directory(self, version: AdapterVersion) -> str:
        """The directory of a version's files, for its engine to read."""
        return str(self._library.directory(version))

    @contextmanager
    def reading_ahead(self, tenant: Tenant, base_model: str, directory: Path) -> Iterator[ReadingAhead]:
        """Have the engine of a model read an upload while it comes. What was read is dropped after the block, unless
        `introduce` or `validate` was given it.

        For a tenant that accepts listed or signed files alone, nothing is read before they have been found to be such.
        """
        model = self._models.find(base_model)
        client = None if model is None or tenant.config.trusts_some_alone else model.client
        ahead = ReadingAhead(None if client is None else client.adapters, directory)
        try:
            yield ahead
        finally:
            ahead.end()

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
            directory, upload = str(files.directory), files.upload
            loaded = await model.client.adapters.start_loading(key, directory, files.hashed, upload=upload)
        except AdapterRejected as error:
            raise FailedPrecondition(error.reason, str(error)) from error
        if not self._is_registered(key):
            self._work.begin(_unload(model.client, key))
        text = AdapterText(model.tokenizer)
        if description.text_digest:
            text = await self._texts.read(str(key), files.directory, description.text_digest, model.tokenizer)
        return adapter_info(description, loaded, _text_warnings(text, description))

    def introduce(self, version: AdapterVersion, files: AdapterFiles) -> None:
        """Pass a LOADING version whose files have been checked on to its engine, which decides."""
        if files.description is None:
            self._registry.fail(version.key, files.problems, files.reason)
            return
        self._descriptions[version.key] = files.description
        client = self._client(version)
        if client is not None:  # else when the model is loaded
            self._deploy(client, version, files.hashed, upload=files.upload)

    def load(self, version: AdapterVersion, residency: Residency = Residency.HOST) -> "asyncio.Task[None]":
        """Begin to bring a version into the memory of its engine, or on to the device.

        Raises what `ModelHost.serving` raises. The task raises FailedPrecondition if the adapter cannot get to the
        device, and Unavailable (ADAPTER_COLD) if it is unloaded meanwhile.
        """
        client = self._models.serving(version.spec.base_model).client
        loading = self._deploy(client, version)
        return loading if residency is Residency.HOST else self._work.begin(self._bring(client, version))

    def prefetch(self, version: AdapterVersion) -> None:
        """Load a version into host memory ahead of its requests, if its model runs and the version is not there."""
        client = self._client(version)
        if client is not None and client.adapters.facts(version.key) is None and version.state is AdapterState.ACTIVE:
            self._deploy(client, version, ahead=True)

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
        return self._work.begin(leaving)

    async def pin(self, version: AdapterVersion, pinned: bool) -> None:
        """Have the engine keep a version on the device, or no longer. For later lives of the engine, the
        registry must be told as well.

        Raises FailedPrecondition (ADAPTER_PIN_LIMIT, or what is wrong with the adapter), and Unavailable (ADAPTER_COLD)
        if it is unloaded meanwhile.
        """
        client = self._client(version)
        if client is not None and version.state is AdapterState.ACTIVE:
            await self._pin(client, version, pinned)

    def remove(self, version: AdapterVersion) -> None:
        """Begin to take a version that is DELETING away from its engine, and then from the registry and the disk."""
        if version.key not in self._removing:
            self._removing.add(version.key)
            self._work.begin(self._remove(version))

    def drop_files(self, digest: str) -> None:
        """Begin to delete the server's own copy of files, unless a version uses it."""
        self._work.begin(self._library.remove(digest, lambda: not self._is_kept(digest)))

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _deploy(
        self,
        client: EngineClient,
        version: AdapterVersion,
        is_hashed: bool = False,
        ahead: bool = False,
        upload: FollowedUpload | None = None,
    ) -> "asyncio.Task[None]":
        """Send the load to the engine now, so that later messages find the adapter registered; take the answer
        later.
        """
        loading = client.adapters.start_loading(version.key, self.directory(version), is_hashed, ahead, upload)
        return self._work.begin(self._take_answer(version.key, loading))

    async def _take_answer(self, key: AdapterKey, loading: "asyncio.Future[AdapterFacts]") -> None:
        with suppress(AdapterNotFound):  # it was deleted meanwhile
            try:
                loaded = await loading
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
        client.adapters.was_read = partial(self._loads.observe, (model.name,))
        versions = self._registry.list_versions(base_model=model.name, include_versions=True)
        for version in versions:
            if version.state is AdapterState.LOADING and version.key in self._descriptions:
                self._deploy(client, version)
        for version in _worth_having(versions, model.config.adapter_host_bytes):
            self._deploy(client, version, ahead=True)
            self._bring_closer(version)

    def _bring_closer(self, version: AdapterVersion) -> None:
        """Bring an active version to the tier in which it belongs ahead of its requests."""
        client = self._client(version)
        if client is None:
            return
        if version.spec.pinned:
            self._work.begin(self._pin_again(client, version))
        elif version.spec.residency is Residency.DEVICE:
            self._work.begin(self._bring(client, version))

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
        if version.current and self._current.get(key.name) != key:
            before = self._current.get(key.name)
            self._current[key.name] = key
            if before is not None:
                self._retire(before)
        if version.state is AdapterState.DELETING and not version.num_requests:
            self.remove(version)

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
            await self._records.saved()  # as long as it is known after a restart, its files must be there
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


def _text_warnings(text: AdapterText, description: AdapterDescription) -> tuple[str, ...]:
    """Warnings about the parts of an adapter's tokenizer and template that are not used as they were trained."""
    trained = {token_id for ids in description.config.trained_tokens.values() for token_id in ids}
    unnamed = sorted(token_id for token_id in trained if token_id >= text.tokenizer.num_token_ids)
    if not unnamed:
        return text.warnings
    listed = ", ".join(map(str, unnamed[:5])) + (" …" if len(unnamed) > 5 else "")
    problem = f"tokens {listed} were trained, and no tokenizer has them: keep tokenizer.json beside the weights"
    return (*text.warnings, problem)


def adapter_info(description: AdapterDescription, loaded: AdapterFacts, warnings: Sequence[str] = ()) -> AdapterInfo:
    """Combine what is known of a version from its files and from the engine."""
    ranks = description.module_ranks
    return AdapterInfo(
        rank=loaded.rank,
        size_bytes=loaded.size_bytes,
        target_modules=tuple(loaded.target_modules),
        alpha=description.config.alpha,
        module_ranks=ranks if len(set(ranks.values())) > 1 and len(ranks) <= MAX_MODULE_RANKS else {},
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
