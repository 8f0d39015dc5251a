"""Registers adapters: those of callers, those of the configuration file, and all of them again after a restart."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count

from loraplex_adapters.errors import UNREADABLE, AdapterConflict, AdapterNotFound
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import AdapterSpec, AdapterState, AdapterVersion
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.adapters.deployer import AdapterDeployer
from loraplex_service.adapters.library import AdapterFiles, AdapterLibrary
from loraplex_service.adapters.records import AdapterRecords
from loraplex_service.admission.tenants import Tenants
from loraplex_service.errors import AlreadyExists, FailedPrecondition, InvalidRequest, LoraplexError, PermissionDenied
from loraplex_service.models.host import ModelHost
from loraplex_service.state import UnsettledChange

logger = logging.getLogger(__name__)

FindFiles = Callable[[AdapterVersion], Awaitable[AdapterFiles]]
MOST_SECONDS_BETWEEN = 60.0  # searches for files that nobody could send


class AdapterRegistrar:
    """Brings versions whose files have been found into the registry, and hands them to the deployer."""

    def __init__(
        self,
        registry: AdapterRegistry,
        records: AdapterRecords,
        deployer: AdapterDeployer,
        library: AdapterLibrary,
        models: ModelHost,
        tenants: Tenants,
        work: BackgroundWork,
        find_files: FindFiles | None = None,
    ) -> None:
        """`find_files`: finds the files of a version, which others may have later; None: they are here, or lost."""
        self._find_files = find_files or library.recheck
        self._look_again = self._recheck if find_files is None else self.bring
        self._registry = registry
        self._records = records
        self._deployer = deployer
        self._library = library
        self._models = models
        self._tenants = tenants
        self._work = work
        records.serve(self.bring, self._pin)

    async def reconcile(self) -> None:
        """Finish interrupted work after a restart, and check changed files and trust again.

        Call it before engines start, so that they get only versions that this configuration accepts.
        """
        versions = self._registry.list_versions(include_versions=True)
        leaving = [version for version in versions if version.state is AdapterState.DELETING]
        staying = [v for v in versions if v.state is not AdapterState.DELETING and not v.is_missing]
        for version in leaving:
            self._deployer.remove(version)
        changed = {version.key for version in await self._library.changed(staying)}
        for version in staying:
            if self._models.find(version.spec.base_model) is None:
                problem = f"model {version.spec.base_model!r} is not configured any more"
                self._registry.fail(version.key, [problem], "MODEL_UNLOADED")
            elif (untrusted := await self._untrusted(version)) is not None:
                logger.warning("adapter %s is not served any more: %s", version.version_name, untrusted)
                self._registry.fail(version.key, [untrusted.message], untrusted.reason)
            elif version.state is not AdapterState.ACTIVE or version.key in changed:
                self._work.begin(self._look_again(self._registry.recheck(version.key)))

    async def sweep(self) -> None:
        """Remove the server's own copies of files that no version needs. Call it once the state knows them all."""
        versions = self._registry.list_versions(include_versions=True)
        kept = {version.key.digest for version in versions if not version.directory}
        await self._library.sweep(kept if self._records.are_whole else None)

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

    async def create_saved(
        self, tenant: str, adapter_id: str, spec: AdapterSpec, files: AdapterFiles, check: Callable[[], None]
    ) -> AdapterVersion:
        """Do as `create`, once the change is saved. `check` runs when no other change is under way, and raises
        objections.

        Raises Unavailable (STATE_UNWRITABLE), too.
        """
        self._library.keep(files)  # before the state says that they are there
        try:
            return await self._records.change(
                f"{tenant}/{adapter_id}",
                lambda registry: _register(registry, tenant, adapter_id, spec, files),
                check,
                lambda: self.create(tenant, adapter_id, spec, files),
            )
        except UnsettledChange:
            raise  # the files may be needed
        except LoraplexError:
            self._deployer.drop_files(files.digest)
            raise

    def create(self, tenant: str, adapter_id: str, spec: AdapterSpec, files: AdapterFiles) -> AdapterVersion:
        """Register a version. It is LOADING until its engine has read it. A known version is returned as it is.

        Raises AlreadyExists, and InvalidRequest for a malformed id.
        """
        try:
            self._library.keep(files)
            version = _register(self._registry, tenant, adapter_id, spec, files)
        except AlreadyExists:
            self._deployer.drop_files(files.digest)
            raise
        if version.state is not AdapterState.LOADING:
            return version
        self._deployer.introduce(version, files)
        return self._registry.get(version.full_name)

    async def create_configured(self, adapter: AdapterConfig) -> None:
        """Register an adapter of the configuration file. Errors are logged, and the other adapters go on."""
        form = adapter.default_constraint
        spec = AdapterSpec(
            base_model=adapter.model,
            source=adapter.source,
            labels=adapter.labels,
            pinned=adapter.pinned,
            residency=Residency[adapter.residency.upper()],
            default_constraint=b"" if form is None else form.message().SerializeToString(deterministic=True),
        )
        try:
            async with self._library.find(adapter.source) as files:
                tenant = self._tenants.get(adapter.tenant)
                await self._library.check_trust(tenant, files.digest, files.directory)
                # What the configuration said already at the last start was perhaps changed by hand since.
                spec = replace(spec, make_current=not self._records.was_configured(adapter.name, files.digest))
                name, files = (adapter.tenant, adapter.adapter_id), self.check_rank(files, adapter.model)
                version = await self._records.configure(
                    "/".join(name),
                    adapter.name,
                    files.digest,
                    lambda registry: _register(registry, *name, spec, files),
                    lambda: self.create(*name, spec, files),
                )
        except LoraplexError as error:
            problem = error.message
            if error.reason == "SOURCE_NOT_ALLOWED":  # which does not say where, since callers may ask
                problem += f"; {adapter.source} was looked for under {self._library.where}"
            logger.error("adapter %s of the configuration is not registered: %s", adapter.name, problem)
            self._registry.register_missing(adapter.tenant, adapter.adapter_id, spec, [problem], error.reason)
            return
        if version.state is AdapterState.FAILED:
            logger.error("adapter %s of the configuration is not valid: %s", adapter.name, "; ".join(version.problems))

    async def bring(self, version: AdapterVersion) -> None:
        """Find and read the files of a version that another replica has registered, however long that takes."""
        if self._models.find(version.spec.base_model) is None:
            problem = f"model {version.spec.base_model!r} is not configured at this replica"
            self._registry.fail(version.key, [problem], "MODEL_UNLOADED")
            return
        with suppress(AdapterNotFound):  # it was deleted meanwhile
            for attempt in count():
                await self._recheck(version)
                version = self._registry.get(version.full_name)
                if version.state is not AdapterState.FAILED or version.reason != UNREADABLE:
                    return
                await asyncio.sleep(min(2.0 ** min(attempt, 6), MOST_SECONDS_BETWEEN))
                if self._registry.get(version.full_name).state is AdapterState.FAILED:
                    self._registry.recheck(version.key)

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _pin(self, version: AdapterVersion) -> None:
        """Pin or unpin a version as another replica was told to."""
        await self._deployer.pin(version, version.spec.pinned)

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
                files = await self._find_files(version)
            except FailedPrecondition as error:
                self._registry.fail(version.key, [error.message], error.reason)
                return
            now = self._registry.get(version.full_name)
            if now.state is AdapterState.LOADING and (untrusted := await self._untrusted(now)) is not None:
                self._registry.fail(version.key, [untrusted.message], untrusted.reason)
            elif now.state is AdapterState.LOADING:
                self._deployer.introduce(version, self.check_rank(files, version.spec.base_model))


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
