"""The files of versions that other replicas have registered: found here, or fetched from those that have them."""

import logging
from collections.abc import Awaitable, Callable, Sequence

from loraplex_adapters.files.remote import RemoteSources
from loraplex_adapters.shared_registry import SharedAdapterRegistry
from loraplex_adapters.versions import AdapterVersion
from loraplex_service.adapters.library import AdapterFiles, AdapterLibrary, Gathering
from loraplex_service.errors import FailedPrecondition, LoraplexError

logger = logging.getLogger(__name__)

Fetch = Callable[[str, str, Gathering], Awaitable[None]]  # from an address, the files of a digest


class SharedFiles:
    """Finds the files of a digest: those that are here, then those of other replicas, then those of their source.

    Whoever they come from, files of another digest are not taken.
    """

    def __init__(
        self,
        registry: SharedAdapterRegistry,
        library: AdapterLibrary,
        peers: Callable[[], Awaitable[Sequence[str]]],
        fetch: Fetch,
    ) -> None:
        self._registry = registry
        self._library = library
        self._peers = peers
        self._fetch = fetch

    async def find(self, version: AdapterVersion) -> AdapterFiles:
        """Find a version's files, and note where they are.

        Raises FailedPrecondition (ADAPTER_UNREADABLE) if nobody has them now, and AdapterNotFound if the version is
        gone meanwhile.
        """
        held = await self._library.held(self._library.directory(version), version.key.digest)
        found = held or await self._from_root(version) or await self._from_peers(version)
        if found is None and RemoteSources.is_remote(version.spec.source):
            found = await self._from_source(version)
        if found is None:
            problem = "its files are not under adapter_roots here, and no other replica could send them"
            raise FailedPrecondition("ADAPTER_UNREADABLE", f"{problem}; they are looked for again")
        return found

    async def _from_root(self, version: AdapterVersion) -> AdapterFiles | None:
        """The files where the source leads to under this replica's own roots."""
        source = version.spec.source
        if not source or RemoteSources.is_remote(source):
            return None
        try:
            async with self._library.find(source) as files:
                return self._noted(version, files)
        except LoraplexError:
            return None  # it is elsewhere

    async def _from_peers(self, version: AdapterVersion) -> AdapterFiles | None:
        for address in await self._peers():
            try:
                async with self._library.gather() as gathering:
                    await self._fetch(address, version.key.digest, gathering)
                    if (found := self._noted(version, await gathering.check(f"files from {address}"))) is not None:
                        return found
                    logger.error("replica %s has sent other files than those of %s", address, version.version_name)
            except LoraplexError as error:
                logger.info("replica %s does not send the files of %s: %s", address, version.version_name, error)
        return None

    async def _from_source(self, version: AdapterVersion) -> AdapterFiles | None:
        try:
            async with self._library.find(version.spec.source) as files:
                return self._noted(version, files)
        except LoraplexError as error:
            raise FailedPrecondition("ADAPTER_UNREADABLE", f"{error.message}; it is tried again") from error

    def _noted(self, version: AdapterVersion, files: AdapterFiles) -> AdapterFiles | None:
        """The files, kept and noted, if they are those of the version."""
        if files.digest != version.key.digest:
            return None
        directory, fingerprint = ("", "") if files.gathered else (str(files.directory), files.fingerprint)
        self._registry.locate(version.key, directory, fingerprint)
        self._library.keep(files)
        return files
