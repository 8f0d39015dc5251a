"""The service's orders about adapters, carried out between steps: load, bring to the device, pin, unload."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from loraplex_adapters.errors import COLD, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.pool import AdapterPool
from loraplex_adapters.runtime.store import AdapterStore, FinishedLoad
from loraplex_engine.link.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    FromEngine,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)


class AdapterTiers:
    """Notes orders, and carries each out as soon as possible. No method waits for a file."""

    def __init__(self, store: AdapterStore, pool: AdapterPool) -> None:
        self._store = store
        self._pool = pool
        self._unloading: set[AdapterKey] = set()
        self._bringing: dict[AdapterKey, None] = {}  # to the device, in the order in which they were asked for
        self._pinning: dict[AdapterKey, None] = {}  # and to stay there
        self._answers: list[FromEngine] = []
        self._changes_seen = -1

    # ---- what is asked for -----------------------------------------------------------------------------------------

    def load(self, message: LoadAdapter) -> None:
        """Start reading an adapter, and then bring it to the device if that is asked for."""
        self._unloading.discard(message.key)
        self._store.register(message.key, Path(message.path))
        if message.residency is Residency.DEVICE:
            self.bring(message.key)

    def unload(self, message: UnloadAdapter) -> None:
        """Free an adapter's memory, once no accepted request uses it; or at least its room on the device."""
        if message.key in self._pinning:
            self._answers.append(AdapterPinned(message.key, False, "it was unloaded meanwhile", COLD))
        self._forget(message.key)
        if message.residency is Residency.DISK:
            self._unloading.add(message.key)
        else:
            self._pool.unload(message.key)

    def bring(self, key: AdapterKey) -> None:
        """Bring an adapter, or a weighted sum of loaded ones, to the device as soon as there is room."""
        self._bringing[key] = None
        self._changes_seen = -1

    def pin(self, message: PinAdapter) -> None:
        """Keep an adapter on the device from when it gets there, or no longer."""
        if message.pinned:
            self._pinning[message.key] = None
            self._changes_seen = -1
        else:
            self._pinning.pop(message.key, None)
            self._pool.unpin(message.key)
            self._answers.append(AdapterPinned(message.key, False))

    # ---- between steps ---------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `advance` or `moves` would do or report anything, now or once a loader thread has finished."""
        return bool(
            self._unloading
            or self._answers
            or self._store.is_loading()
            or self._store.moved
            or self._pool.moved
            or ((self._bringing or self._pinning) and self._pool.changes != self._changes_seen)
        )

    def advance(self, users: Container[AdapterKey]) -> list[FromEngine]:
        """Take in finished loads, and carry out the orders that are possible now. `users`: the adapters in use."""
        events, self._answers = self._answers, []
        events.extend(_load_event(finished) for finished in self._store.poll() if not finished.key.parts)
        for key in [key for key in self._unloading if key not in users]:
            self._unloading.remove(key)
            self._pool.unload(key)
            self._store.unregister(key)
            events.append(AdapterUnloaded(key))
        if (self._bringing or self._pinning) and self._pool.changes != self._changes_seen:
            self._changes_seen = self._pool.changes
            for key in self._bringing | self._pinning:
                events.extend(self._try_to_bring(key))
        return events

    def moves(self) -> list[FromEngine]:
        """The adapters whose tier has changed since the last call."""
        moved = dict.fromkeys([*self._store.moved, *self._pool.moved])
        self._store.moved.clear()
        self._pool.moved.clear()
        found = [(key, self._residency(key)) for key in moved if key.parts or self._store.is_registered(key)]
        return [AdaptersMoved(found)] if found else []

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _residency(self, key: AdapterKey) -> Residency:
        if self._pool.holds(key):
            return Residency.DEVICE
        return Residency.HOST if self._store.holds(key) else Residency.DISK

    def _forget(self, key: AdapterKey) -> None:
        self._bringing.pop(key, None)
        self._pinning.pop(key, None)

    def _try_to_bring(self, key: AdapterKey) -> list[FromEngine]:
        pinning = key in self._pinning
        if pinning:
            self._pool.recall(key)
        try:
            if not self._pool.bring_in(key):
                if pinning:
                    self._pool.make_room(key)
                return []
            self._pool.moved.add(key)  # even if it was there already: whoever asked waits to hear of it
            if pinning:
                self._pool.pin(key)
        except AdapterConflict as error:
            self._forget(key)
            return [AdapterPinned(key, False, str(error))]
        except AdapterRejected as error:
            self._forget(key)
            failed = AdapterFailed(key, error.problems, error.reason)
            return [failed, AdapterPinned(key, False, str(error), error.reason)] if pinning else [failed]
        self._forget(key)
        return [AdapterPinned(key, True)] if pinning else []


def _load_event(finished: FinishedLoad) -> AdapterLoaded | AdapterFailed:
    loaded = finished.loaded
    if loaded is None:
        return AdapterFailed(finished.key, finished.problems, finished.reason)
    return AdapterLoaded(
        finished.key,
        rank=loaded.rank,
        size_bytes=loaded.nbytes,
        target_modules=list(loaded.target_modules),
        warnings=list(loaded.warnings),
        whole=loaded.whole,
    )
