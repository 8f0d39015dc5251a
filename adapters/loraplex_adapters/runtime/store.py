"""The host tier: adapters in host memory, read by its own threads; the least recently used is dropped first."""

from __future__ import annotations

import logging
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from loraplex_adapters.errors import COLD, INVALID, TOO_LARGE, UNREADABLE, AdapterRejected
from loraplex_adapters.files.growing import Growth
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.pace import Pace
from loraplex_adapters.runtime.arrivals import Arrivals
from loraplex_adapters.runtime.loader_threads import begin_loader
from loraplex_adapters.runtime.mirror import NO_MIRROR, Mirror
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.weights import LoadedAdapter, load_adapter, load_composition
from loraplex_kernels.ops import LoraWeights, PackedLora

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
MAX_FAILED_COMPOSITIONS = 64


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """The outcome of one load: `loaded`, or the problems."""

    key: AdapterKey
    loaded: LoadedAdapter | None
    problems: list[str] = field(default_factory=list)
    reason: str = INVALID  # their kind
    number: int = 0  # as other ranks have it


@dataclass(slots=True)
class _Source:
    """A registered adapter's directory, or a composition's members, and the state of its load."""

    paths: tuple[Path, ...]
    loading: bool = False
    is_hashed: bool = False  # the next load need not make the digest: whoever has just written the files did
    arriving: Future[LoadedAdapter] | None = None  # what the next load takes instead of reading
    problems: list[str] = field(default_factory=list)  # of the last load, if it failed
    reason: str = INVALID
    num_failures: int = 0
    retry_at: float = 0.0  # by the clock: until then the problems are the answer
    nbytes: int = 0  # in host memory; 0 until it was loaded once


def rejection(key: AdapterKey, paths: Sequence[Path], error: Exception) -> AdapterRejected:
    """What a load that ended with this error says of the adapter."""
    if isinstance(error, AdapterRejected):
        return error
    if isinstance(error, OSError):
        names = ", ".join(path.name for path in paths)
        return AdapterRejected([f"{names}: cannot be read: {error.strerror or error}"], UNREADABLE)
    logger.error("adapter %s: unexpected failure while loading", key, exc_info=error)
    return AdapterRejected([f"unexpected failure while loading: {type(error).__name__}: {error}"])


class AdapterStore:
    """Reads adapters into host memory and keeps as many as fit in a budget of bytes.

    Called from one thread; only the reading happens in others, and `poll` takes in what they have finished. A broken
    adapter costs its own requests an error and a retry after a growing pause; loads of others go on beside it.
    """

    def __init__(
        self,
        targets: Mapping[str, LoraTarget],
        dtype: torch.dtype,
        max_rank: int,
        budget_bytes: int,
        num_threads: int,
        pack: Callable[[LoraWeights], PackedLora],  # for the tables of the model's sites
        load_share: float = 1.0,  # of one core, for all loads together while requests run
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,  # None: threads of its own
        mirror: Mirror = NO_MIRROR,
    ) -> None:
        self._load = partial(load_adapter, targets=targets, dtype=dtype, max_rank=max_rank, pack=pack)
        self._load_composition = partial(load_composition, targets=targets, dtype=dtype, max_rank=max_rank, pack=pack)
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._mirror = mirror
        self._num_threads = num_threads
        self.pace = Pace(load_share)
        begin = {"initializer": begin_loader, "initargs": (torch.get_num_threads(),)}
        loaders = partial(ThreadPoolExecutor, num_threads, **begin)
        self._executor = executor or loaders("adapter-loader")
        self._arrivals = Arrivals(self._read_arriving, loaders("adapter-arrival"))
        self._finished: queue.SimpleQueue[tuple[_Source, FinishedLoad]] = queue.SimpleQueue()
        self._sources: dict[AdapterKey, _Source] = {}
        self._loaded: OrderedDict[AdapterKey, LoadedAdapter] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._num_in_flight = 0  # loads that `poll` has not taken in yet
        self._awaited: set[AdapterKey] = set()  # loads under way that somebody waits for
        self._later: dict[AdapterKey, _Source] = {}  # to be read as soon as a thread has nothing else to do
        self.changes = 0  # grows whenever a load ends or an adapter is forgotten
        self.moved: set[AdapterKey] = set()  # adapters that came or left, until the caller clears it

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def close(self) -> None:
        """Stop the threads once they have finished what they are reading."""
        self._arrivals.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # ---- what exists -----------------------------------------------------------------------------------------------

    def register(
        self, key: AdapterKey, path: Path, is_hashed: bool = False, ahead: bool = False, upload: int = 0
    ) -> None:
        """Register an adapter and read it into memory. `poll` reports the outcome, each time anew.

        is_hashed: the files have the key's digest; what is read again later is checked. ahead: nobody waits for it.
        upload: they are those of this number, whole by now; 0: of none.
        """
        source = self._sources.setdefault(key, _Source((path,)))
        source.paths, source.is_hashed = (path,), is_hashed
        arriving = self._arrivals.take(upload)
        if key in self._loaded:
            self._num_in_flight += 1
            loaded = self._loaded[key]
            self._finished.put((source, FinishedLoad(key, loaded, number=loaded.number)))
        elif not source.loading:
            source.arriving = arriving
            self._start(key, source, ahead)
        elif not ahead:
            self.hurry(key)

    def receive(self, upload: int, path: Path, size: int, num_bytes: int) -> None:
        """Read an adapter ahead while its weights, of `size` bytes, arrive in a directory: so many are there.

        `register` makes use of it, if it comes to anything. Other ranks take what is whole alone.
        """
        if self._mirror is NO_MIRROR and size <= self._budget_bytes:
            self._arrivals.note(upload, path, size, num_bytes)
            self._set_pace()

    def stop_receiving(self, upload: int) -> None:
        """Forget an upload that nobody has registered, if there is one of this number."""
        self._arrivals.drop(upload)
        self._set_pace()

    def unregister(self, key: AdapterKey) -> None:
        """Forget an adapter; a load under way is dropped. An unknown key is not an error."""
        composed = [other for other in self._sources if other.parts and key in other.members]
        for known in (key, *composed):
            if self._sources.pop(known, None) is not None:
                self._later.pop(known, None)
                self._end_wait(known)
                self._drop(known)
                self.changes += 1

    def is_registered(self, key: AdapterKey) -> bool:
        """Whether an adapter, or every member of a composition, is registered."""
        return all(member in self._sources for member in key.members)

    def holds(self, key: AdapterKey) -> bool:
        """Whether an adapter is in memory. Does not count as use."""
        return key in self._loaded

    def residents(self) -> list[AdapterKey]:
        """The adapters in memory, least recently used first."""
        return list(self._loaded)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: AdapterKey) -> LoadedAdapter | None:
        """The adapter if it is in memory, which makes it the most recently used."""
        loaded = self._loaded.get(key)
        if loaded is not None:
            self._loaded.move_to_end(key)
        return loaded

    def request(self, key: AdapterKey, may_evict: bool = True, ahead: bool = False) -> None:
        """Start to read an adapter, if it is not in memory yet, and return at once.

        With `may_evict` False an adapter that is known not to fit beside the others is left alone. `ahead`: nobody
        waits for it. Raises AdapterRejected if it is not registered, or if it failed and the pause before the next try
        is not over.
        """
        source = self._sources.get(key)
        if source is None and key.parts and self.is_registered(key):
            source = self._compose(key)
        if source is None:
            raise AdapterRejected([f"adapter {key} is not registered with this engine"], COLD)
        if source.loading and not ahead:
            self.hurry(key)
        if key in self._loaded or source.loading:
            return
        if source.problems and self._clock() < source.retry_at:
            raise AdapterRejected(source.problems, source.reason)
        if may_evict or self._used_bytes + source.nbytes <= self._budget_bytes:
            self._start(key, source, ahead)

    def hurry(self, key: AdapterKey) -> None:
        """Note that somebody waits for a load from now on. One that is not under way is not an error."""
        source = self._sources.get(key)
        if source is None or not source.loading:
            return
        self._awaited.add(key)
        self._set_pace()
        if self._later.pop(key, None) is not None:
            self._begin(key, source)

    def is_loading(self) -> bool:
        """Whether a load is under way, or waits for its turn or to be polled."""
        return self._num_in_flight > 0 or bool(self._later)

    def poll(self) -> list[FinishedLoad]:
        """The loads that have ended since the last call. Never waits."""
        arrived: list[FinishedLoad] = []
        while not self._finished.empty():
            source, finished = self._finished.get()
            self._num_in_flight -= 1
            if self._sources.get(finished.key) is not source:
                self._forget(finished)  # nobody waits for it any more
                if finished.key not in self._sources:
                    self._end_wait(finished.key)
                continue
            arrived.append(self._take_in(source, finished))
        if arrived:
            self.changes += 1
            self._evict(keep={finished.key for finished in arrived})
        self._begin_later()
        return arrived

    def _compose(self, key: AdapterKey) -> _Source:
        """Register a composition by its members until it leaves the memory; of failed ones only the latest stay."""
        failed = [other for other, source in self._sources.items() if other.parts and source.problems]
        for other in failed[:-MAX_FAILED_COMPOSITIONS]:
            del self._sources[other]
        paths = tuple(path for member in key.members for path in self._sources[member].paths)
        source = self._sources[key] = _Source(paths)
        return source

    def _start(self, key: AdapterKey, source: _Source, ahead: bool) -> None:
        source.loading = True
        self._later[key] = source
        if ahead:
            self._begin_later()
        else:
            self.hurry(key)

    def _begin_later(self) -> None:
        """Begin as many of the loads that nobody waits for as there are idle threads: others come before them."""
        while self._later and self._num_in_flight < self._num_threads:
            key = next(iter(self._later))
            self._begin(key, self._later.pop(key))

    def _end_wait(self, key: AdapterKey) -> None:
        self._awaited.discard(key)
        self._set_pace()

    def _set_pace(self) -> None:
        self.pace.hurry(bool(self._awaited or self._arrivals))  # whoever uploads waits

    def _begin(self, key: AdapterKey, source: _Source) -> None:
        is_hashed, source.is_hashed = source.is_hashed, False
        arriving, source.arriving = source.arriving, None
        self._num_in_flight += 1
        read = partial(self._read, key, source, is_hashed, self._mirror.load(key, source.paths))
        if arriving is None:
            self._executor.submit(read)
        else:
            arriving.add_done_callback(lambda ended: self._finish_arrival(key, source, ended, read))

    def _finish_arrival(
        self, key: AdapterKey, source: _Source, arriving: Future[LoadedAdapter], read: Callable[[], None]
    ) -> None:
        """Take what was read during the upload, in whatever thread; if that failed, read the files as any others."""
        error = arriving.exception()
        if error is None:
            self._finished.put((source, FinishedLoad(key, replace(arriving.result(), key=key))))
        else:
            logger.info("adapter %s: could not be read while it came: %s", key, error)
            self._executor.submit(read)

    def _read_arriving(self, upload: int, path: Path, growth: Growth) -> LoadedAdapter:
        """Read an upload, in a thread of uploads."""
        key, rest = AdapterKey("upload", str(upload)), self.pace.begin()
        return self._load(key, path, rest=rest, is_hashed=True, growth=growth)

    def _read(self, key: AdapterKey, source: _Source, is_hashed: bool, number: int) -> None:
        """Read an adapter, in a loader thread, as all ranks do."""
        loaded, rejected = self._loaded_or_not(key, source, is_hashed, number)
        others = self._mirror.finish(number, rejected)
        rejected = others.rejected or rejected
        if rejected is None and loaded is not None:
            finished = FinishedLoad(key, replace(loaded, other_bytes=others.nbytes), number=number)
        else:
            assert rejected is not None
            finished = FinishedLoad(key, None, rejected.problems, rejected.reason, number)
        self._finished.put((source, finished))

    def _loaded_or_not(
        self, key: AdapterKey, source: _Source, is_hashed: bool, number: int
    ) -> tuple[LoadedAdapter | None, AdapterRejected | None]:
        started = time.perf_counter()
        rest = self.pace.begin()
        try:
            if key.parts:
                loaded = self._load_composition(key, source.paths, rest=rest)
            else:
                total = self._mirror.total(number)
                loaded = self._load(key, *source.paths, rest=rest, is_hashed=is_hashed, total=total)
            return replace(loaded, number=number), None
        except Exception as error:  # whatever is in the files must not silence the request that waits for them
            return None, rejection(key, source.paths, error)
        finally:
            logger.info("adapter %s: read in %.3f s", key, time.perf_counter() - started)

    def _take_in(self, source: _Source, finished: FinishedLoad) -> FinishedLoad:
        key, loaded = finished.key, finished.loaded
        source.loading = False
        self._end_wait(key)
        if loaded is not None and loaded.nbytes > self._budget_bytes:
            problem = f"it needs {loaded.nbytes} bytes of host memory, all adapters together may use "
            finished = FinishedLoad(key, None, [f"{problem}{self._budget_bytes}"], TOO_LARGE, finished.number)
            loaded = None
        if loaded is None:
            self._forget(finished)
            pause = min(FIRST_BACKOFF_SECONDS * 2.0**source.num_failures, MAX_BACKOFF_SECONDS)
            source.problems, source.reason = finished.problems, finished.reason
            source.num_failures += 1
            source.retry_at = self._clock() + pause
            return finished
        source.problems, source.num_failures, source.nbytes = [], 0, loaded.nbytes
        if key not in self._loaded:
            self._loaded[key] = loaded
            self._used_bytes += loaded.nbytes
            self._note_move(key)
        elif self._loaded[key] is not loaded:
            self._forget(finished)
        return finished

    def _forget(self, finished: FinishedLoad) -> None:
        """Have other ranks drop what is not kept here."""
        if finished.loaded is None or finished.loaded is not self._loaded.get(finished.key):
            self._mirror.forget(finished.number)

    def _note_move(self, key: AdapterKey) -> None:
        if not key.parts:  # the tier of a composition is never asked for
            self.moved.add(key)

    # ---- room ------------------------------------------------------------------------------------------------------

    def _evict(self, keep: set[AdapterKey]) -> None:
        """Drop the least recently used until the budget holds. Adapters in `keep` have just come: the requests that
        wait for them see them before they can be dropped, however small the budget."""
        for key in list(self._loaded):
            if self._used_bytes <= self._budget_bytes:
                return
            if key not in keep:
                self._drop(key)

    def _drop(self, key: AdapterKey) -> None:
        loaded = self._loaded.pop(key, None)
        if loaded is not None:
            self._mirror.forget(loaded.number)
            self._used_bytes -= loaded.nbytes
            self._note_move(key)
            if key.parts:
                self._sources.pop(key, None)
