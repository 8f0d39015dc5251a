"""What the service asks for adapters: done between steps, as soon as it can be, and told once."""

from pathlib import Path
from typing import Any

import pytest

from loraplex_adapters.errors import AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.store import FinishedLoad
from loraplex_engine.adapter_tiers import AdapterTiers
from loraplex_engine.link.messages import (
    AdapterFailed,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    FromEngine,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)

KEY = AdapterKey("shared/pirate", "a" * 64)
OTHER = AdapterKey("shared/poet", "b" * 64)
TO_DEVICE = LoadAdapter(KEY, "somewhere", Residency.DEVICE)


class FakeStore:
    """What is registered is in memory at once."""

    def __init__(self) -> None:
        self.known: set[AdapterKey] = set()
        self.moved: set[AdapterKey] = set()

    def register(self, key: AdapterKey, path: Path) -> None:
        self.known.add(key)
        self.moved.add(key)

    def unregister(self, key: AdapterKey) -> None:
        self.known.discard(key)

    def is_registered(self, key: AdapterKey) -> bool:
        return key in self.known

    holds = is_registered

    def is_loading(self) -> bool:
        return False

    def poll(self) -> list[FinishedLoad]:
        return []


class FakePool:
    """Brings in while there is room; pins while the test allows it."""

    def __init__(self) -> None:
        self.changes = 0
        self.room = 1
        self.moved: set[AdapterKey] = set()
        self.resident: set[AdapterKey] = set()
        self.pinned: set[AdapterKey] = set()
        self.wanted_room: list[AdapterKey] = []
        self.recalled: list[AdapterKey] = []
        self.problems: list[str] = []
        self.pins_allowed = True

    def holds(self, key: AdapterKey) -> bool:
        return key in self.resident

    def bring_in(self, key: AdapterKey) -> bool:
        if self.problems:
            raise AdapterRejected(self.problems, "ADAPTER_TOO_LARGE")
        if len(self.resident | {key}) > self.room:
            return False
        self.resident.add(key)
        self.moved.add(key)
        return True

    def recall(self, key: AdapterKey) -> None:
        self.recalled.append(key)

    def make_room(self, key: AdapterKey) -> None:
        self.wanted_room.append(key)

    def unload(self, key: AdapterKey) -> None:
        self.resident.discard(key)
        self.moved.add(key)
        self.changes += 1

    def pin(self, key: AdapterKey) -> None:
        if not self.pins_allowed:
            raise AdapterConflict("unpin others")
        self.pinned.add(key)

    def unpin(self, key: AdapterKey) -> None:
        self.pinned.discard(key)


class Bench:
    def __init__(self) -> None:
        self.store, self.pool = FakeStore(), FakePool()
        parts: Any = (self.store, self.pool)
        self.tiers = AdapterTiers(*parts)

    def events(self, users: tuple[AdapterKey, ...] = ()) -> list[FromEngine]:
        return self.tiers.advance(users) + self.tiers.moves()


def test_an_adapter_is_brought_to_the_device_and_that_is_told_once() -> None:
    bench = Bench()
    bench.tiers.load(TO_DEVICE)
    assert bench.events() == [AdaptersMoved([(KEY, Residency.DEVICE)])]
    assert not bench.tiers.has_work()


def test_a_load_alone_leaves_the_device_as_it_is() -> None:
    bench = Bench()
    bench.tiers.load(LoadAdapter(KEY, "somewhere"))
    assert bench.events() == [AdaptersMoved([(KEY, Residency.HOST)])]
    assert bench.pool.resident == set()


def test_an_adapter_for_which_there_is_no_room_waits_without_keeping_the_loop_busy() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.tiers.load(TO_DEVICE)
    assert bench.events() == [AdaptersMoved([(KEY, Residency.HOST)])]
    assert not bench.tiers.has_work()
    bench.pool.unload(OTHER)
    assert bench.tiers.has_work()
    assert bench.events() == [AdaptersMoved([(KEY, Residency.DEVICE)])]


def test_an_adapter_that_can_never_be_there_is_failed_with_the_reason() -> None:
    bench = Bench()
    bench.pool.problems = ["it needs more than there is"]
    bench.tiers.load(TO_DEVICE)
    assert bench.events()[0] == AdapterFailed(KEY, ["it needs more than there is"], "ADAPTER_TOO_LARGE")
    assert not bench.tiers.has_work()


def test_a_weighted_sum_is_brought_to_the_device_and_that_is_told() -> None:
    bench = Bench()
    both = compose([(KEY, 0.5), (OTHER, 0.5)])
    bench.tiers.bring(both)
    assert bench.events() == [AdaptersMoved([(both, Residency.DEVICE)])]
    bench.pool.unload(both)
    [moved] = bench.events()
    assert isinstance(moved, AdaptersMoved)
    assert moved.moves[0] != (both, Residency.DEVICE)


def test_a_pin_calls_an_adapter_back_that_had_to_leave() -> None:
    bench = Bench()
    bench.store.register(KEY, Path("somewhere"))
    bench.tiers.pin(PinAdapter(KEY, True))
    bench.events()
    assert bench.pool.recalled == [KEY]


def test_a_pin_brings_the_adapter_in_first() -> None:
    bench = Bench()
    bench.store.register(KEY, Path("somewhere"))
    bench.tiers.pin(PinAdapter(KEY, True))
    assert AdapterPinned(KEY, True) in bench.events()
    assert bench.pool.pinned == {KEY}


def test_a_pin_that_waits_for_room_asks_for_it() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.store.register(KEY, Path("somewhere"))
    bench.tiers.pin(PinAdapter(KEY, True))
    bench.events()
    assert bench.pool.wanted_room == [KEY]


def test_a_pin_too_many_is_answered_with_the_problem() -> None:
    bench = Bench()
    bench.pool.pins_allowed = False
    bench.store.register(KEY, Path("somewhere"))
    bench.tiers.pin(PinAdapter(KEY, True))
    assert AdapterPinned(KEY, False, "unpin others") in bench.events()


def test_an_unpin_takes_back_a_pin_that_has_not_happened_yet() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.store.register(KEY, Path("somewhere"))
    bench.tiers.pin(PinAdapter(KEY, True))
    bench.tiers.pin(PinAdapter(KEY, False))
    assert AdapterPinned(KEY, False) in bench.events()
    bench.pool.unload(OTHER)
    assert bench.events() == []


def test_an_unpin_does_not_keep_an_adapter_from_the_device_that_was_to_come_anyway() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.tiers.load(TO_DEVICE)
    bench.tiers.pin(PinAdapter(KEY, True))
    bench.tiers.pin(PinAdapter(KEY, False))
    bench.events()
    bench.pool.unload(OTHER)
    assert bench.events() == [AdaptersMoved([(KEY, Residency.DEVICE)])]
    assert bench.pool.pinned == set()


@pytest.mark.parametrize("residency", [Residency.DISK, Residency.HOST])
def test_a_pin_that_waits_is_answered_when_the_adapter_is_unloaded(residency: Residency) -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.store.register(KEY, Path("somewhere"))
    bench.tiers.pin(PinAdapter(KEY, True))
    bench.events()
    bench.tiers.unload(UnloadAdapter(KEY, residency))
    assert AdapterPinned(KEY, False, "it was unloaded meanwhile", "ADAPTER_COLD") in bench.events()


def test_an_adapter_that_is_on_the_device_already_is_said_to_be_there() -> None:
    """Who asks may have heard that it would leave, and not that it did not."""
    bench = Bench()
    bench.tiers.load(TO_DEVICE)
    bench.events()
    bench.tiers.unload(UnloadAdapter(KEY))
    bench.tiers.load(TO_DEVICE)
    assert bench.events(users=(KEY,)) == [AdaptersMoved([(KEY, Residency.DEVICE)])]


def test_an_adapter_leaves_the_device_and_stays_in_memory() -> None:
    bench = Bench()
    bench.tiers.load(TO_DEVICE)
    bench.events()
    bench.tiers.unload(UnloadAdapter(KEY, Residency.HOST))
    assert bench.events() == [AdaptersMoved([(KEY, Residency.HOST)])]


def test_an_adapter_in_use_is_unloaded_when_it_is_not() -> None:
    bench = Bench()
    bench.tiers.load(TO_DEVICE)
    bench.events()
    bench.tiers.unload(UnloadAdapter(KEY))
    assert bench.events(users=(KEY,)) == []
    assert bench.tiers.has_work()
    assert bench.events() == [AdapterUnloaded(KEY)]
