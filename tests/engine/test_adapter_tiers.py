"""What the service asks for adapters: done between steps, as soon as it can be, and told once."""

from pathlib import Path
from typing import Any

import pytest

from loraplex_adapters.errors import AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.store import FinishedLoad
from loraplex_adapters.runtime.weights import LoadedAdapter
from loraplex_engine.adapter_tiers import AdapterTiers
from loraplex_engine.link.messages import AdapterFacts, AdaptersChanged, AdapterStatus, WantAdapter

KEY = AdapterKey("shared/pirate", "a" * 64)
OTHER = AdapterKey("shared/poet", "b" * 64)
TO_DEVICE = WantAdapter(KEY, 1, "somewhere", Residency.DEVICE)

LOADED = LoadedAdapter(KEY, {}, {"layers.0.q_proj": 8}, ("a warning",), whole="it is whole")


class FakeStore:
    """What is registered is in memory at once."""

    def __init__(self) -> None:
        self.known: set[AdapterKey] = set()
        self.moved: set[AdapterKey] = set()
        self.finished: list[FinishedLoad] = []

    def register(
        self, key: AdapterKey, path: Path, is_hashed: bool = False, ahead: bool = False, upload: int = 0
    ) -> None:
        self.known.add(key)
        self.moved.add(key)

    def hurry(self, key: AdapterKey) -> None:
        pass

    def unregister(self, key: AdapterKey) -> None:
        self.known.discard(key)

    def is_registered(self, key: AdapterKey) -> bool:
        return key in self.known

    holds = is_registered

    def is_loading(self) -> bool:
        return False

    def poll(self) -> list[FinishedLoad]:
        finished, self.finished = self.finished, []
        return finished


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
        self.kept: list[AdapterKey] = []
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
        if key in self.resident:
            self.resident.discard(key)
            self.moved.add(key)
            self.changes += 1

    def keep(self, key: AdapterKey) -> None:
        self.kept.append(key)

    def pin(self, key: AdapterKey) -> None:
        if not self.pins_allowed:
            raise AdapterConflict("unpin others")
        self.pinned.add(key)

    def unpin(self, key: AdapterKey) -> None:
        self.pinned.discard(key)

    def is_pinned(self, key: AdapterKey) -> bool:
        return key in self.pinned


class Bench:
    def __init__(self) -> None:
        self.store, self.pool = FakeStore(), FakePool()
        parts: Any = (self.store, self.pool)
        self.tiers = AdapterTiers(*parts)

    def statuses(self, users: tuple[AdapterKey, ...] = ()) -> list[AdapterStatus]:
        self.tiers.advance(users)
        return [
            status for event in self.tiers.changed() if isinstance(event, AdaptersChanged) for status in event.statuses
        ]

    def want(self, order: int, least: Residency = Residency.DISK, most: Residency = Residency.DEVICE) -> None:
        self.tiers.want(WantAdapter(KEY, order, least=least, most=most))

    def pin(self, order: int, least: Residency = Residency.DISK) -> None:
        self.tiers.want(WantAdapter(KEY, order, least=least, pinned=True))


def said(order: int, tier: Residency, **fields: Any) -> list[AdapterStatus]:
    return [AdapterStatus(KEY, order, tier, **fields)]


def test_an_adapter_is_brought_to_the_device_and_that_is_told_once() -> None:
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    assert bench.statuses() == said(1, Residency.DEVICE)
    assert not bench.tiers.has_work()


def test_a_load_alone_leaves_the_device_as_it_is() -> None:
    bench = Bench()
    bench.tiers.want(WantAdapter(KEY, 1, "somewhere"))
    assert bench.statuses() == said(1, Residency.HOST)
    assert bench.pool.resident == set()


def test_an_adapter_for_which_there_is_no_room_waits_without_keeping_the_loop_busy() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.tiers.want(TO_DEVICE)
    assert bench.statuses() == said(1, Residency.HOST)
    assert not bench.tiers.has_work()
    bench.pool.unload(OTHER)
    assert bench.tiers.has_work()
    assert bench.statuses() == said(1, Residency.DEVICE)


def test_every_wish_is_answered_even_if_it_changes_nothing() -> None:
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    bench.statuses()
    bench.want(2)
    assert bench.tiers.has_work()
    assert bench.statuses() == said(2, Residency.DEVICE)


def test_a_later_change_is_told_with_the_newest_wish() -> None:
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    bench.statuses()
    bench.want(2)
    bench.statuses()
    bench.pool.unload(KEY)
    assert bench.statuses() == said(2, Residency.HOST)


def test_adapters_that_change_in_one_step_are_told_in_one_message() -> None:
    bench = Bench()
    bench.tiers.want(WantAdapter(KEY, 1, "somewhere"))
    bench.tiers.want(WantAdapter(OTHER, 2, "elsewhere"))
    bench.tiers.advance(())
    [message] = bench.tiers.changed()
    assert isinstance(message, AdaptersChanged)
    assert [(status.key, status.order) for status in message.statuses] == [(KEY, 1), (OTHER, 2)]


def test_an_adapter_that_was_read_is_told_with_its_facts_until_it_is_forgotten() -> None:
    bench = Bench()
    bench.store.finished = [FinishedLoad(KEY, LOADED)]
    bench.tiers.want(WantAdapter(KEY, 1, "somewhere"))
    assert bench.statuses() == said(
        1, Residency.HOST, facts=AdapterFacts(8, 0, ["q_proj"], ["a warning"], "it is whole")
    )
    bench.want(2, most=Residency.DISK)
    assert bench.statuses() == said(2, Residency.DISK)


def test_a_load_that_failed_is_told_once() -> None:
    bench = Bench()
    bench.store.finished = [FinishedLoad(KEY, None, ["a tensor is missing"])]
    bench.tiers.want(TO_DEVICE)
    assert bench.statuses()[0].problems == ["a tensor is missing"]
    bench.want(2)
    assert bench.statuses()[0].problems == []


def test_an_adapter_that_can_never_be_there_is_failed_with_the_reason() -> None:
    bench = Bench()
    bench.pool.problems = ["it needs more than there is"]
    bench.tiers.want(TO_DEVICE)
    problem: Any = {"problems": ["it needs more than there is"], "reason": "ADAPTER_TOO_LARGE"}
    assert bench.statuses() == said(1, Residency.HOST, **problem)
    assert not bench.tiers.has_work()


def test_a_weighted_sum_is_brought_to_the_device_and_that_is_told() -> None:
    bench = Bench()
    both = compose([(KEY, 0.5), (OTHER, 0.5)])
    bench.tiers.want(WantAdapter(both, 1, least=Residency.DEVICE))
    assert bench.statuses() == [AdapterStatus(both, 1, Residency.DEVICE)]
    bench.pool.unload(both)
    assert [status.tier for status in bench.statuses()] != [Residency.DEVICE]


def test_a_pin_calls_an_adapter_back_that_had_to_leave() -> None:
    bench = Bench()
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    bench.statuses()
    assert bench.pool.recalled == [KEY]


def test_a_pin_brings_the_adapter_in_first() -> None:
    bench = Bench()
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    assert bench.statuses() == said(1, Residency.DEVICE, pinned=True)
    assert bench.pool.pinned == {KEY}


def test_a_pin_that_waits_for_room_asks_for_it() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    bench.statuses()
    assert bench.pool.wanted_room == [KEY]


def test_a_pin_too_many_is_answered_with_the_problem_and_leaves_the_adapter_on_the_device() -> None:
    bench = Bench()
    bench.pool.pins_allowed = False
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    assert bench.statuses() == said(1, Residency.DEVICE, problems=["unpin others"])
    assert not bench.tiers.has_work()


def test_an_unpin_takes_back_a_pin_that_has_not_happened_yet() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    bench.want(2)
    assert bench.statuses() == said(2, Residency.HOST)
    bench.pool.unload(OTHER)
    assert bench.statuses() == []


def test_an_unpin_does_not_keep_an_adapter_from_the_device_that_was_to_come_anyway() -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.tiers.want(TO_DEVICE)
    bench.pin(2, least=Residency.DEVICE)
    bench.want(3, least=Residency.DEVICE)
    bench.statuses()
    bench.pool.unload(OTHER)
    assert bench.statuses() == said(3, Residency.DEVICE)
    assert bench.pool.pinned == set()


def test_an_unpin_lets_a_pinned_adapter_go() -> None:
    bench = Bench()
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    bench.statuses()
    bench.want(2)
    assert bench.statuses() == said(2, Residency.DEVICE)


@pytest.mark.parametrize("residency", [Residency.DISK, Residency.HOST])
def test_a_pin_that_waits_ends_when_the_adapter_is_unloaded(residency: Residency) -> None:
    bench = Bench()
    bench.pool.resident.add(OTHER)
    bench.store.register(KEY, Path("somewhere"))
    bench.pin(1)
    bench.statuses()
    bench.want(2, most=residency)
    assert bench.statuses() == said(2, residency)
    bench.pool.unload(OTHER)
    assert bench.statuses() == []


def test_an_adapter_that_is_on_the_device_already_is_said_to_be_there() -> None:
    """Who asks may have heard that it would leave, and not that it did not."""
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    bench.statuses()
    bench.want(2, most=Residency.DISK)
    bench.tiers.want(WantAdapter(KEY, 3, "somewhere", Residency.DEVICE))
    assert bench.statuses(users=(KEY,)) == said(3, Residency.DEVICE)


def test_an_adapter_leaves_the_device_and_stays_in_memory() -> None:
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    bench.statuses()
    bench.want(2, most=Residency.HOST)
    assert bench.statuses() == said(2, Residency.HOST)


def test_an_adapter_in_use_is_unloaded_when_it_is_not() -> None:
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    bench.statuses()
    bench.want(2, most=Residency.DISK)
    assert bench.statuses(users=(KEY,)) == said(2, Residency.DEVICE)
    assert bench.tiers.has_work()
    assert bench.statuses() == said(2, Residency.DISK)


def test_a_wish_for_the_device_takes_back_one_to_leave_it() -> None:
    bench = Bench()
    bench.tiers.want(TO_DEVICE)
    bench.want(2, most=Residency.HOST)
    kept_before = list(bench.pool.kept)
    bench.want(3, most=Residency.DEVICE)
    assert bench.pool.kept == [*kept_before, KEY]
