"""What the service wants of adapters, compared with what is, and carried out between steps."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from loraplex_adapters.errors import AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.pool import AdapterPool
from loraplex_adapters.runtime.store import AdapterStore, FinishedLoad
from loraplex_adapters.runtime.weights import LoadedAdapter
from loraplex_engine.link.messages import AdapterFacts, AdaptersChanged, AdapterStatus, FromEngine, WantAdapter
from loraplex_engine.link.pooling import ClassifierFacts


class AdapterTiers:
    """Notes wishes, carries each out as soon as possible, and reports every change. No method waits for a file."""

    def __init__(self, store: AdapterStore, pool: AdapterPool) -> None:
        self._store = store
        self._pool = pool
        self._orders: dict[AdapterKey, int] = {}  # of the newest wishes
        self._facts: dict[AdapterKey, AdapterFacts] = {}  # of registered adapters that were read
        self._dropping: set[AdapterKey] = set()  # wanted on disk alone
        self._bringing: dict[AdapterKey, bool] = {}  # wanted on the device, in that order; True: and pinned
        self._changed: dict[AdapterKey, None] = {}  # since the last report, in that order
        self._problems: dict[AdapterKey, tuple[list[str], str]] = {}  # with their reason, since the last report
        self._changes_seen = -1

    def want(self, wish: WantAdapter) -> None:
        """Note what is wanted of an adapter from now on."""
        key = wish.key
        self._orders[key] = wish.order
        self._changed[key] = None
        if wish.path:
            self._store.register(key, Path(wish.path), wish.is_hashed, wish.ahead, wish.upload)
        elif not wish.ahead:
            self._store.hurry(key)
        if not wish.pinned and self._pool.is_pinned(key):
            self._pool.unpin(key)
        if wish.most is Residency.HOST:
            self._pool.unload(key)
        elif wish.most is Residency.DEVICE:
            self._pool.keep(key)
        (self._dropping.add if wish.most is Residency.DISK else self._dropping.discard)(key)
        if wish.most is Residency.DEVICE and (wish.pinned or wish.least is Residency.DEVICE):
            self._bringing[key] = wish.pinned
            self._changes_seen = -1
        else:
            self._bringing.pop(key, None)

    # ---- between steps ---------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `advance` or `changed` would do or report anything, now or once a loader thread has finished."""
        return bool(
            self._dropping
            or self._changed
            or self._store.is_loading()
            or self._store.moved
            or self._pool.moved
            or (self._bringing and self._pool.changes != self._changes_seen)
        )

    def advance(self, users: Container[AdapterKey]) -> None:
        """Take in finished loads, and carry out the wishes that are possible now. `users`: the adapters in use."""
        for finished in self._store.poll():
            if not finished.key.parts:
                self._take_in(finished)
        for key in [key for key in self._dropping if key not in users]:
            self._drop(key)
        if self._bringing and self._pool.changes != self._changes_seen:
            self._changes_seen = self._pool.changes
            for key, pinned in list(self._bringing.items()):
                self._try_to_bring(key, pinned)

    def changed(self) -> list[FromEngine]:
        """The adapters that have changed, or for which a wish has come, since the last call; empty: none."""
        moved = [key for key in (*self._store.moved, *self._pool.moved) if self._is_known(key)]
        keys = dict.fromkeys([*self._changed, *moved])
        statuses = [self._status(key) for key in keys]
        self._store.moved.clear()
        self._pool.moved.clear()
        self._changed.clear()
        self._problems.clear()
        for key in keys:
            if key not in self._bringing and (key.parts or not self._is_known(key)):
                self._orders.pop(key, None)
        return [AdaptersChanged(statuses)] if statuses else []

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _is_known(self, key: AdapterKey) -> bool:
        return bool(key.parts) or self._store.is_registered(key)

    def _status(self, key: AdapterKey) -> AdapterStatus:
        problems, reason = self._problems.get(key, ([], ""))
        order, facts = self._orders.get(key, 0), self._facts.get(key)
        return AdapterStatus(key, order, self._residency(key), self._pool.is_pinned(key), facts, problems, reason)

    def _residency(self, key: AdapterKey) -> Residency:
        if self._pool.holds(key):
            return Residency.DEVICE
        return Residency.HOST if self._store.holds(key) else Residency.DISK

    def _take_in(self, finished: FinishedLoad) -> None:
        self._changed[finished.key] = None
        if finished.loaded is None:
            self._problems[finished.key] = finished.problems, finished.reason
        else:
            self._facts[finished.key] = _facts(finished.loaded)

    def _drop(self, key: AdapterKey) -> None:
        self._dropping.remove(key)
        self._pool.unload(key)
        self._store.unregister(key)
        self._facts.pop(key, None)
        self._changed[key] = None

    def _try_to_bring(self, key: AdapterKey, pinned: bool) -> None:
        if pinned:
            self._pool.recall(key)
        try:
            if not self._pool.bring_in(key):
                if pinned:
                    self._pool.make_room(key)
                return
            if pinned:
                self._pool.pin(key)
        except AdapterConflict as error:
            self._problems[key] = [str(error)], ""
        except AdapterRejected as error:
            self._problems[key] = error.problems, error.reason
        del self._bringing[key]
        self._changed[key] = None


def _facts(loaded: LoadedAdapter) -> AdapterFacts:
    return AdapterFacts(
        rank=loaded.rank,
        size_bytes=loaded.nbytes,
        target_modules=list(loaded.target_modules),
        warnings=list(loaded.warnings),
        whole=loaded.whole,
        classifier=ClassifierFacts(loaded.num_labels, loaded.each_token) if loaded.num_labels else None,
    )
