"""The files of adapters: found where the operator allows it, or gathered by the server itself, and checked."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from loraplex_adapters.errors import AdapterRejected, SourceNotAllowed
from loraplex_adapters.files.depot import Depot
from loraplex_adapters.files.remote import RemoteSources
from loraplex_adapters.files.source import (
    AdapterDescription,
    AdapterSource,
    ReceivedDigest,
    describe,
    digest,
    fingerprint,
)
from loraplex_adapters.files.trust import SIGNATURE_FILE, is_trusted
from loraplex_adapters.versions import AdapterVersion
from loraplex_engine.link.uploads import FollowedUpload
from loraplex_service.admission.tenants import Tenant
from loraplex_service.errors import FailedPrecondition, PermissionDenied, Unavailable
from loraplex_service.state import RETRY_SECONDS

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

FLUSHED_BYTES = 32 << 20  # of an upload at once
READERS = 2  # adapters whose files are checked at once
CLEARING_SECONDS = 5.0  # that the end of the server waits for; the next start clears the rest


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of one adapter version: the directory that holds them, and what was read from them."""

    directory: Path
    digest: str
    description: AdapterDescription | None  # None: they are no adapter that can be served, and
    problems: tuple[str, ...] = ()  # these are the reasons,
    reason: str = "ADAPTER_INVALID"  # or ADAPTER_RANK_TOO_HIGH
    fingerprint: str = ""
    gathered: bool = False  # by the server itself: `keep` moves them to where they stay
    hashed: bool = False  # the digest is that of the bytes as they came, which nobody else could change since
    upload: FollowedUpload | None = None  # by which an engine has begun to read them


class AdapterLibrary:
    """Finds, receives and checks the files of adapters, in threads. For one event loop."""

    def __init__(self, source: AdapterSource, remote: RemoteSources, depot: Depot) -> None:
        self._source = source
        self._remote = remote
        self._depot = depot
        # Threads of their own: reading gigabytes must not hold up the prompts that are tokenised in the common ones.
        self._readers = ThreadPoolExecutor(READERS, "adapter-inspect")
        self._clearing: set[asyncio.Task[None]] = set()

    @property
    def where(self) -> str:
        """The allowed places of adapters, as text for error messages."""
        return ", ".join(map(str, self._source.roots)) or "no directory: adapter_roots is empty"

    async def close(self) -> None:
        """Wait a while for removals under way, and for nothing else."""
        if self._clearing:
            await asyncio.wait(self._clearing, timeout=CLEARING_SECONDS)
        self._readers.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def find(self, reference: str) -> AsyncIterator[AdapterFiles]:
        """Find the files that a reference names, and check them as far as possible without their model.

        Files in a remote source are fetched first, and removed at the end of the block unless `keep` was called.

        Raises PermissionDenied (SOURCE_NOT_ALLOWED), and FailedPrecondition (ADAPTER_INVALID) for files so wrong that
        they have not even a digest, or (ADAPTER_UNREADABLE) that cannot be fetched.
        """
        if RemoteSources.is_remote(reference):
            async with self.gather() as gathering:
                await self._fetch(reference, gathering)
                yield await gathering.check(f"source {reference!r}")
            return
        try:
            directory = await self._in_thread(self._source.resolve, reference)
        except SourceNotAllowed as error:
            raise PermissionDenied(str(error), "SOURCE_NOT_ALLOWED") from error
        yield await self._checked(directory, f"source {reference!r}")

    async def _fetch(self, reference: str, gathering: "Gathering") -> None:
        try:
            await gathering.do(self._remote.fetch, reference, gathering.directory)
        except SourceNotAllowed as error:
            raise PermissionDenied(str(error), "SOURCE_NOT_ALLOWED") from error
        except AdapterRejected as error:
            raise FailedPrecondition(error.reason, f"source {reference!r}: {error}") from error

    @asynccontextmanager
    async def gather(self) -> AsyncIterator["Gathering"]:
        """Yield a place for files that a caller sends.

        The files are removed at the end of the block, unless `keep` was called.
        """
        gathering = Gathering(self._readers, self._depot)
        try:
            yield await gathering.made()
        finally:
            clearing = asyncio.create_task(gathering.discard())
            self._clearing.add(clearing)
            clearing.add_done_callback(self._clearing.discard)
            await asyncio.shield(clearing)  # who was cancelled may be cancelled once more

    async def check_trust(self, tenant: Tenant, digest: str, directory: Path) -> None:
        """Raise PermissionDenied (ADAPTER_UNTRUSTED) if the tenant does not accept files with this digest."""
        config = tenant.config
        if not config.trusts_some_alone:
            return
        digests = {listed.removeprefix("sha256:") for listed in config.adapter_digests}
        keys = [Path(file) for file in config.adapter_keys]
        if not await self._in_thread(is_trusted, digest, directory, digests, keys):
            message = (
                f"tenant {tenant.name!r} accepts only listed or signed adapters; the digest sha256:{digest} is not "
                f"listed, and {SIGNATURE_FILE} holds no signature of it by a trusted key"
            )
            raise PermissionDenied(message, "ADAPTER_UNTRUSTED")

    def keep(self, files: AdapterFiles) -> None:
        """Keep gathered files for a version that is about to be registered. Raises Unavailable (STATE_UNWRITABLE)."""
        if files.gathered:
            with _writing():
                self._depot.admit(files.directory, files.digest)

    def directory(self, version: AdapterVersion) -> Path:
        """The directory of a version's files."""
        return Path(version.directory) if version.directory else self.copy(version.key.digest)

    def copy(self, digest: str) -> Path:
        """The directory of the server's own copy of the files with this digest, if it has one."""
        return self._depot.path(digest)

    async def remove(self, digest: str, is_unused: Callable[[], bool]) -> None:
        """Remove the server's own copy of the files with this digest, if it has one and nobody uses it."""
        withdrawn = self._depot.withdraw(digest) if is_unused() else None
        if withdrawn is not None:
            await self._in_thread(self._depot.discard, withdrawn)

    async def sweep(self, keep: Collection[str] | None) -> None:
        """Remove unfinished files, and the server's own copies of digests that are not in `keep`; None: of none."""
        await self._in_thread(self._depot.sweep, keep)

    async def changed(self, versions: Iterable[AdapterVersion]) -> list[AdapterVersion]:
        """The versions whose files have changed since they were checked, or are gone."""
        return await self._in_thread(lambda: [version for version in versions if self._has_changed(version)])

    async def recheck(self, version: AdapterVersion) -> AdapterFiles:
        """Read and check a version's files again. Raises FailedPrecondition if they are gone."""
        directory = self.directory(version)
        files = await self._checked(directory, "its files")
        if files.digest != version.key.digest:
            found = f"its files have the digest {files.digest[:12]}… now: they were changed"
            return AdapterFiles(directory, version.key.digest, None, (found,))
        return files

    async def held(self, directory: Path, digest: str) -> AdapterFiles | None:
        """The files in a directory, checked; None: they are not there, or have another digest."""
        try:
            files = await self._checked(directory, "its files")
        except FailedPrecondition:
            return None
        return files if files.digest == digest else None

    def _has_changed(self, version: AdapterVersion) -> bool:
        found = fingerprint(self.directory(version))
        return found != version.fingerprint if version.directory else found is None

    async def _checked(self, directory: Path, where: str) -> AdapterFiles:
        try:
            return await self._in_thread(_read, directory)
        except AdapterRejected as error:
            raise FailedPrecondition("ADAPTER_INVALID", f"{where}: {error}") from error
        except OSError as error:  # whose own text has the whole path, which is nothing for tenants
            problem = f"{Path(error.filename or directory).name}: {error.strerror or type(error).__name__}"
            raise FailedPrecondition("ADAPTER_INVALID", f"{where}: {problem}") from error

    async def _in_thread(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: work(*args, **kwargs))


class Gathering:
    """Files of one adapter on their way to the server.

    A cancelled call does not stop the thread that writes for it; the files stay here until the thread is done.
    """

    directory: Path  # once it is made

    def __init__(self, threads: ThreadPoolExecutor, depot: Depot) -> None:
        self._threads = threads
        self._depot = depot
        self._doing: set[asyncio.Future[Any]] = set()
        self._received = ReceivedDigest()
        self._made = self._start(depot.begin)

    async def made(self) -> Self:
        """Make the directory and return this object. Raises Unavailable (STATE_UNWRITABLE)."""
        with _writing():
            self.directory = await asyncio.shield(self._made)
        return self

    async def append(self, name: str, chunk: bytes) -> None:
        """Write the next bytes of a file. Raises Unavailable (STATE_UNWRITABLE)."""
        with _writing():
            await self.do(_append, self.directory / name, chunk, self._received)

    async def check(self, where: str) -> AdapterFiles:
        """Check the files, once all of them have arrived.

        Raises FailedPrecondition (ADAPTER_INVALID), Unavailable (STATE_UNWRITABLE).
        """
        try:
            files = await self.do(_read, self.directory, self._received)
        except (AdapterRejected, OSError) as error:
            raise FailedPrecondition("ADAPTER_INVALID", f"{where}: {error}") from error
        with _writing():
            await self.do(self._depot.settle, self.directory)
        return files

    async def do(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run work on the files in a thread."""
        return await asyncio.shield(self._start(work, *args, **kwargs))

    async def discard(self) -> None:
        """Remove files that were not kept, once no thread writes any more."""
        await asyncio.wait(self._doing | {self._made})
        if self._made.exception() is None:
            await self.do(self._depot.discard, self._made.result())

    def _start(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[R]":
        doing = asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        self._doing.add(doing)
        doing.add_done_callback(self._ended)
        return doing

    def _ended(self, doing: "asyncio.Future[Any]") -> None:
        self._doing.discard(doing)
        if not doing.cancelled():
            doing.exception()  # seen, even if its caller has gone


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an OSError while writing into Unavailable (STATE_UNWRITABLE): a full disk is no mistake of the caller."""
    try:
        yield
    except OSError as error:
        logger.error("the files of an adapter cannot be kept: %s", error)
        message = f"the server cannot keep the files now ({error.strerror or error}); try again later"
        raise Unavailable("STATE_UNWRITABLE", message, RETRY_SECONDS) from error


def _read(directory: Path, received: ReceivedDigest | None = None) -> AdapterFiles:
    """`received`: of files that the server gathered; None: of others."""
    gathered = received is not None
    seen = "" if gathered else fingerprint(directory) or ""
    known = None if received is None else received.digests()
    try:
        description = describe(directory, received)
    except AdapterRejected as error:
        found = digest(directory) if known is None else known[0]
        return AdapterFiles(directory, found, None, tuple(error.problems), fingerprint=seen, gathered=gathered)
    return AdapterFiles(
        directory, description.digest, description, fingerprint=seen, gathered=gathered, hashed=known is not None
    )


def _append(file: Path, chunk: bytes, received: ReceivedDigest) -> None:
    """Write the next bytes of a file, and have the disk begin with them: at the end little is left to wait for."""
    received.add(file.name, chunk)
    with file.open("ab") as opened:
        opened.write(chunk)
        if opened.tell() // FLUSHED_BYTES != (opened.tell() - len(chunk)) // FLUSHED_BYTES:
            opened.flush()
            os.fdatasync(opened.fileno())
