from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.errors import UNREADABLE, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.pace import Pace
from loraplex_adapters.runtime.mirror import NO_MIRROR, Mirror, NoMirror, OtherLoads
from loraplex_adapters.runtime.store import AdapterStore
from loraplex_adapters.runtime.targets import LoraTarget

AdapterMaker = Callable[..., Path]
KeyOf = Callable[[Path], AdapterKey]

ADAPTER_BYTES = 2 * 4 * 4 * (8 + 12)


class ByHand(Executor):
    """Runs what was submitted when the test says so, in the order that it says."""

    def __init__(self) -> None:
        self.submitted: deque[Callable[[], Any]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self, index: int = 0) -> None:
        self.submitted.rotate(-index)
        self.submitted.popleft()()
        self.submitted.rotate(index)

    def run_all(self) -> None:
        while self.submitted:
            self.run()


class OtherRanks(NoMirror):
    """Ranks to whom a load ends as the test says."""

    def __init__(self, rejected: AdapterRejected | None = None, nbytes: int = 0) -> None:
        self.rejected, self.nbytes = rejected, nbytes
        self.held: set[int] = set()

    def load(self, key: AdapterKey, paths: Sequence[Path]) -> int:
        self.held.add(7)
        return 7

    def finish(self, number: int, rejected: AdapterRejected | None) -> OtherLoads:
        return OtherLoads(self.rejected, self.nbytes)

    def forget(self, number: int) -> None:
        self.held.remove(number)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def executor() -> ByHand:
    return ByHand()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_store(targets: dict[str, LoraTarget], executor: ByHand, clock: Clock) -> Callable[..., AdapterStore]:
    def make(budget_bytes: int = 10 * ADAPTER_BYTES, mirror: Mirror = NO_MIRROR) -> AdapterStore:
        return AdapterStore(
            targets,
            torch.float32,
            max_rank=64,
            budget_bytes=budget_bytes,
            num_threads=1,
            pack=lambda weights: weights,
            clock=clock,
            executor=executor,
            mirror=mirror,
        )

    return make


@pytest.fixture
def store(make_store: Callable[..., AdapterStore]) -> AdapterStore:
    return make_store()


def broken(directory: Path) -> Path:
    (directory / "adapter_model.safetensors").write_bytes(b"fake weights")
    return directory


def test_a_registered_adapter_is_read_and_reported_once(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    key = key_of(directory := make_adapter())
    store.register(key, directory)
    assert store.is_registered(key)
    assert store.is_loading()
    assert store.poll() == []
    executor.run_all()
    (finished,) = store.poll()
    assert finished.key == key
    assert finished.loaded is not None
    assert finished.loaded is store.get(key)
    assert not store.is_loading()
    assert store.poll() == []


def test_registering_what_is_in_memory_reports_it_again_unread(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    key = key_of(directory := make_adapter())
    store.register(key, directory)
    executor.run_all()
    store.poll()
    store.register(key, directory)
    assert not executor.submitted
    (finished,) = store.poll()
    assert finished.loaded is store.get(key)
    assert store.used_bytes == ADAPTER_BYTES


def test_registering_twice_reads_once(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    key = key_of(directory := make_adapter())
    store.register(key, directory)
    store.register(key, directory)
    store.request(key)
    assert len(executor.submitted) == 1


def test_a_broken_adapter_is_reported_with_its_problems_and_blocks_nobody(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    good, bad = make_adapter("good"), make_adapter("bad")
    good_key, bad_key = key_of(good), AdapterKey("shared/bad", "0" * 64)
    store.register(bad_key, broken(bad))
    store.register(good_key, good)
    executor.run_all()
    finished = {result.key: result for result in store.poll()}
    assert "too short" in finished[bad_key].problems[0]
    assert finished[bad_key].loaded is None
    assert finished[good_key].problems == []


def test_other_ranks_drop_what_could_not_be_read_here(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker
) -> None:
    others = OtherRanks()
    store = make_store(mirror=others)
    store.register(AdapterKey("shared/bad", "0" * 64), broken(make_adapter("bad")))
    executor.run_all()
    assert store.poll()[0].problems
    assert not others.held


def test_an_adapter_takes_what_the_rank_takes_that_has_most_of_it(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    store = make_store(mirror=OtherRanks(nbytes=ADAPTER_BYTES + 1))
    store.register(key_of(directory := make_adapter()), directory)
    executor.run_all()
    store.poll()
    assert store.used_bytes == ADAPTER_BYTES + 1


def test_what_one_rank_cannot_read_is_dropped_by_all_for_its_reason(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    others = OtherRanks(AdapterRejected(["rank 1: the disk failed"], UNREADABLE))
    store = make_store(mirror=others)
    store.register(key_of(directory := make_adapter()), directory)
    executor.run_all()
    (finished,) = store.poll()
    assert (finished.loaded, finished.problems, finished.reason) == (None, ["rank 1: the disk failed"], UNREADABLE)
    assert not store.holds(finished.key)
    assert not others.held


def test_a_load_that_takes_for_ever_does_not_hold_up_the_others(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    slow, quick = make_adapter("slow"), make_adapter("quick", seed=1)
    store.register(key_of(slow), slow)
    store.register(key_of(quick), quick)
    executor.run(1)
    (finished,) = store.poll()
    assert finished.key == key_of(quick)


def test_a_failure_is_remembered_for_a_growing_pause(
    store: AdapterStore, executor: ByHand, clock: Clock, make_adapter: AdapterMaker
) -> None:
    key = AdapterKey("shared/bad", "0" * 64)
    store.register(key, broken(make_adapter()))
    for pause in (1.0, 2.0, 4.0):
        executor.run_all()
        store.poll()
        clock.now += pause - 0.01
        with pytest.raises(AdapterRejected, match="too short"):
            store.request(key)
        assert not executor.submitted
        clock.now += 0.02
        store.request(key)
        assert len(executor.submitted) == 1


def test_registering_a_failed_adapter_again_reads_it_at_once(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    directory = make_adapter()
    key, content = key_of(directory), (directory / "adapter_model.safetensors").read_bytes()
    store.register(key, broken(directory))
    executor.run_all()
    store.poll()
    (directory / "adapter_model.safetensors").write_bytes(content)
    store.register(key, directory)
    executor.run_all()
    (finished,) = store.poll()
    assert finished.loaded is not None
    store.request(key)


def test_a_missing_directory_is_a_problem_of_that_adapter(
    store: AdapterStore, executor: ByHand, tmp_path: Path
) -> None:
    store.register(AdapterKey("shared/gone", "0" * 64), tmp_path / "gone")
    executor.run_all()
    (finished,) = store.poll()
    assert "adapter_config.json is missing" in finished.problems[0]


def test_an_unexpected_failure_is_reported_and_not_lost(
    store: AdapterStore, executor: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(store, "_load", fail)
    store.register(AdapterKey("shared/odd", "0" * 64), tmp_path)
    executor.run_all()
    (finished,) = store.poll()
    assert "ZeroDivisionError: boom" in finished.problems[0]


def test_an_unknown_adapter_is_refused(store: AdapterStore) -> None:
    with pytest.raises(AdapterRejected, match="not registered"):
        store.request(AdapterKey("shared/unknown", "0" * 64))


def test_the_least_recently_used_is_dropped_when_the_budget_is_full(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    store = make_store(budget_bytes=2 * ADAPTER_BYTES)
    keys = []
    for i in range(3):
        directory = make_adapter(str(i), seed=i)
        keys.append(key_of(directory))
        store.register(keys[i], directory)
        executor.run_all()
        store.poll()
        store.get(keys[0])
    assert store.residents() == [keys[2], keys[0]]
    assert store.used_bytes == 2 * ADAPTER_BYTES
    assert store.get(keys[1]) is None
    store.request(keys[1])
    assert len(executor.submitted) == 1


def test_those_who_arrive_together_are_all_seen_before_one_is_dropped(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    store = make_store(budget_bytes=ADAPTER_BYTES)
    keys = []
    for i in range(3):
        directory = make_adapter(str(i), seed=i)
        keys.append(key_of(directory))
        store.register(keys[i], directory)
    executor.run(0)
    executor.run(0)
    store.poll()
    assert store.residents() == keys[:2]
    executor.run_all()
    store.poll()
    assert store.residents() == keys[2:]


def test_an_adapter_larger_than_the_budget_is_refused_with_both_sizes(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    store = make_store(budget_bytes=ADAPTER_BYTES - 1)
    store.register(key_of(directory := make_adapter()), directory)
    executor.run_all()
    (finished,) = store.poll()
    assert finished.loaded is None
    assert str(ADAPTER_BYTES) in finished.problems[0]
    assert str(ADAPTER_BYTES - 1) in finished.problems[0]
    assert store.used_bytes == 0


def test_ahead_of_its_turn_an_adapter_is_not_read_if_another_had_to_go(
    make_store: Callable[..., AdapterStore], executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    store = make_store(budget_bytes=ADAPTER_BYTES)
    first, second = make_adapter("0"), make_adapter("1", seed=1)
    for directory in (first, second):
        store.register(key_of(directory), directory)
        executor.run_all()
        store.poll()
    store.request(key_of(first), may_evict=False)
    assert not executor.submitted
    store.request(key_of(first))
    assert executor.submitted


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether somebody waits for a load, as the pace was told."""
    told = [False]
    monkeypatch.setattr(Pace, "hurry", lambda _, awaited: told.append(awaited))
    return told


def test_what_nobody_waits_for_is_read_once_threads_are_idle(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    first, second, third = (make_adapter(str(i), seed=i) for i in range(3))
    store.register(key_of(first), first, ahead=True)
    store.register(key_of(second), second, ahead=True)
    store.register(key_of(third), third)
    assert len(executor.submitted) == 2  # the first and, by a thread's next turn, the third
    executor.run_all()
    assert [finished.key for finished in store.poll()] == [key_of(first), key_of(third)]
    assert store.is_loading()
    executor.run_all()
    assert [finished.key for finished in store.poll()] == [key_of(second)]
    assert not store.is_loading()


@pytest.mark.parametrize("how", ["register", "request", "hurry"])
def test_what_was_read_ahead_hurries_once_somebody_waits(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf, paced: list[bool], how: str
) -> None:
    first, second = (make_adapter(str(i), seed=i) for i in range(2))
    for directory in (first, second):
        store.register(key_of(directory), directory, ahead=True)
    assert (len(executor.submitted), paced[-1]) == (1, False)
    store.register(key_of(second), second) if how == "register" else getattr(store, how)(key_of(second))
    assert (len(executor.submitted), paced[-1]) == (2, True)
    executor.run_all()
    store.poll()
    assert paced[-1] is False


def test_nobody_waits_for_what_was_forgotten(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf, paced: list[bool]
) -> None:
    first, second = (make_adapter(str(i), seed=i) for i in range(2))
    store.register(key_of(first), first)
    store.register(key_of(second), second, ahead=True)
    store.unregister(key_of(second))
    assert paced[-1] is True
    store.unregister(key_of(first))
    assert paced[-1] is False
    executor.run_all()
    store.poll()
    assert not store.is_loading()
    assert not executor.submitted


def test_a_forgotten_adapter_leaves_memory(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    key = key_of(directory := make_adapter())
    store.register(key, directory)
    executor.run_all()
    store.poll()
    changes = store.changes
    store.unregister(key)
    store.unregister(key)
    assert not store.is_registered(key)
    assert store.get(key) is None
    assert store.used_bytes == 0
    assert store.changes == changes + 1


def test_what_was_still_being_read_when_it_was_forgotten_is_dropped(
    store: AdapterStore, executor: ByHand, make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    key = key_of(directory := make_adapter())
    store.register(key, directory)
    store.unregister(key)
    store.register(key, directory)
    executor.run(0)
    assert store.poll() == []
    executor.run(0)
    assert len(store.poll()) == 1
    assert store.used_bytes == ADAPTER_BYTES


def test_threads_of_its_own_read_in_the_background(
    targets: dict[str, LoraTarget], make_adapter: AdapterMaker, key_of: KeyOf
) -> None:
    store = AdapterStore(
        targets, torch.float32, max_rank=64, budget_bytes=10**6, num_threads=2, pack=lambda weights: weights
    )
    directories = [make_adapter(str(i), seed=i) for i in range(8)]
    for directory in directories:
        store.register(key_of(directory), directory)
    found: set[AdapterKey] = set()
    while store.is_loading():
        found.update(finished.key for finished in store.poll() if finished.loaded)
    assert found == {key_of(directory) for directory in directories}
    store.close()
