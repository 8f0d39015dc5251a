from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex_adapters.errors import AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.runtime.pool import AdapterPool
from loraplex_adapters.runtime.weights import LoadedAdapter
from loraplex_kernels.ops import LoraSlice, LoraWeights, PackedLora

SLOT_BYTES = 4 * (2 + 3)  # of an adapter of rank 1 at the one site below


def key(name: str) -> AdapterKey:
    return AdapterKey(f"shared/{name}", name * 64)


def weights(rank: int) -> LoraWeights:
    return LoraWeights(torch.zeros(rank, 2), (LoraSlice(0, 0, torch.zeros(3, rank)),))


class FakeStore:
    """Host memory as the test fills it."""

    def __init__(self) -> None:
        self.changes = 0
        self.loaded: dict[AdapterKey, LoadedAdapter] = {}
        self.requested: list[tuple[AdapterKey, bool]] = []
        self.problems: dict[AdapterKey, list[str]] = {}
        self.ahead: bool | None = None  # of the last request

    def get(self, key: AdapterKey) -> LoadedAdapter | None:
        return self.loaded.get(key)

    def request(self, key: AdapterKey, may_evict: bool = True, ahead: bool = False) -> None:
        if key in self.problems:
            raise AdapterRejected(self.problems[key])
        self.requested.append((key, may_evict))
        self.ahead = ahead

    def finish(self, key: AdapterKey, rank: int = 1, site: str = "site") -> None:
        self.loaded[key] = LoadedAdapter(key, {site: weights(rank)}, {"q_proj": rank}, ())
        self.changes += 1


class FakeTable:
    def __init__(self) -> None:
        self.slots: dict[int, PackedLora] = {}
        self.error: Exception | None = None

    def put(self, slot: int, packed: PackedLora) -> None:
        if self.error is not None:
            raise self.error
        assert slot not in self.slots, "a slot is taken while it is in use"
        self.slots[slot] = packed

    def remove(self, slot: int) -> None:
        self.slots.pop(slot, None)


class FakeSite:
    def __init__(self) -> None:
        self.table = FakeTable()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def sites() -> dict[str, FakeSite]:
    return {"site": FakeSite(), "other": FakeSite()}


@pytest.fixture
def make_pool(store: FakeStore, sites: dict[str, FakeSite]) -> Callable[..., AdapterPool]:
    def make(num_slots: int = 2, budget_bytes: int = 100 * SLOT_BYTES) -> AdapterPool:
        return AdapterPool(sites, store, num_slots, budget_bytes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def pool(make_pool: Callable[..., AdapterPool]) -> AdapterPool:
    return make_pool()


def test_an_adapter_that_is_not_in_memory_is_requested_and_waited_for(pool: AdapterPool, store: FakeStore) -> None:
    assert pool.acquire(key("a")) is None
    assert store.requested == [(key("a"), True)]
    before = pool.changes
    store.finish(key("a"))
    assert pool.changes > before
    assert pool.acquire(key("a")) == 0


def test_a_load_that_failed_is_raised_to_whoever_asks(pool: AdapterPool, store: FakeStore) -> None:
    store.problems[key("a")] = ["it is broken"]
    with pytest.raises(AdapterRejected, match="it is broken"):
        pool.acquire(key("a"))


def test_weights_are_put_at_their_site_alone(pool: AdapterPool, store: FakeStore, sites: dict[str, FakeSite]) -> None:
    store.finish(key("a"))
    slot = pool.acquire(key("a"))
    assert list(sites["site"].table.slots) == [slot]
    assert sites["other"].table.slots == {}


def test_requests_of_one_adapter_share_its_slot(pool: AdapterPool, store: FakeStore) -> None:
    store.finish(key("a"))
    assert pool.acquire(key("a")) == pool.acquire(key("a")) == 0
    assert pool.residents() == [(key("a"), 2)]
    assert pool.used_bytes == SLOT_BYTES


def test_an_adapter_stays_after_its_last_request(pool: AdapterPool, store: FakeStore) -> None:
    store.finish(key("a"))
    pool.acquire(key("a"))
    pool.release(key("a"))
    assert pool.residents() == [(key("a"), 0)]


def test_the_least_recently_used_leaves_when_slots_are_full(pool: AdapterPool, store: FakeStore) -> None:
    for name in "abc":
        store.finish(key(name))
    for name in "aba":
        pool.acquire(key(name))
        pool.release(key(name))
    assert pool.acquire(key("c")) == 1
    assert [resident for resident, _ in pool.residents()] == [key("a"), key("c")]


def test_an_adapter_in_use_never_leaves(pool: AdapterPool, store: FakeStore) -> None:
    for name in "abc":
        store.finish(key(name))
    pool.acquire(key("a"))
    pool.acquire(key("b"))
    assert pool.acquire(key("c")) is None
    before = pool.changes
    pool.release(key("a"))
    assert pool.changes > before
    assert pool.acquire(key("c")) == 0
    assert pool.residents() == [(key("b"), 1), (key("c"), 1)]


def test_bytes_are_counted_exactly_and_as_many_leave_as_must(
    make_pool: Callable[..., AdapterPool], store: FakeStore
) -> None:
    pool = make_pool(num_slots=8, budget_bytes=5 * SLOT_BYTES)
    for name, rank in (("a", 1), ("b", 2), ("c", 1), ("d", 3)):
        store.finish(key(name), rank)
    for name in "abc":
        pool.acquire(key(name))
        pool.release(key(name))
    assert pool.used_bytes == 4 * SLOT_BYTES
    pool.acquire(key("d"))
    assert [resident for resident, _ in pool.residents()] == [key("c"), key("d")]
    assert pool.used_bytes == 4 * SLOT_BYTES


def test_nobody_leaves_for_an_adapter_that_would_not_fit_even_then(
    make_pool: Callable[..., AdapterPool], store: FakeStore
) -> None:
    pool = make_pool(num_slots=8, budget_bytes=4 * SLOT_BYTES)
    for name, rank in (("a", 1), ("b", 3), ("c", 3)):
        store.finish(key(name), rank)
    pool.acquire(key("a"))
    pool.release(key("a"))
    pool.acquire(key("b"))
    assert pool.acquire(key("c")) is None
    assert pool.residents() == [(key("a"), 0), (key("b"), 1)]


def test_an_adapter_larger_than_the_whole_budget_is_refused(
    make_pool: Callable[..., AdapterPool], store: FakeStore
) -> None:
    store.finish(key("a"), rank=2)
    with pytest.raises(AdapterRejected, match=f"needs {2 * SLOT_BYTES} bytes on the device.*{SLOT_BYTES}"):
        make_pool(budget_bytes=SLOT_BYTES).acquire(key("a"))


def test_while_there_is_no_room_an_adapter_is_read_only_into_free_memory(pool: AdapterPool, store: FakeStore) -> None:
    for name in "ab":
        store.finish(key(name))
        pool.acquire(key(name))
    assert pool.acquire(key("c")) is None
    assert store.requested[-1] == (key("c"), False)


def test_a_device_that_is_out_of_memory_refuses_that_adapter_and_is_left_clean(
    pool: AdapterPool, store: FakeStore, sites: dict[str, FakeSite]
) -> None:
    store.finish(key("a"))
    sites["site"].table.error = torch.OutOfMemoryError("no memory")
    with pytest.raises(AdapterRejected, match="no memory"):
        pool.acquire(key("a"))
    sites["site"].table.error = None
    assert pool.residents() == []
    assert pool.acquire(key("a")) == 0


# ---- unload, pin, make room ------------------------------------------------------------------------------------------


def test_unloading_waits_for_the_last_request(pool: AdapterPool, store: FakeStore) -> None:
    store.finish(key("a"))
    pool.acquire(key("a"))
    pool.unload(key("a"))
    assert pool.acquire(key("a")) == 0  # an accepted request keeps it
    pool.release(key("a"))
    assert pool.residents() == [(key("a"), 1)]
    pool.release(key("a"))
    assert pool.residents() == []
    assert pool.used_bytes == 0


def test_unloading_that_waits_can_be_taken_back(pool: AdapterPool, store: FakeStore) -> None:
    store.finish(key("a"))
    pool.acquire(key("a"))
    pool.unload(key("a"))
    pool.keep(key("a"))
    pool.release(key("a"))
    assert pool.residents() == [(key("a"), 0)]


def test_unloading_an_idle_adapter_frees_it_at_once(
    pool: AdapterPool, store: FakeStore, sites: dict[str, FakeSite]
) -> None:
    store.finish(key("a"))
    pool.acquire(key("a"))
    pool.release(key("a"))
    pool.unload(key("a"))
    pool.unload(key("a"))
    assert pool.residents() == []
    assert sites["site"].table.slots == {}


def test_with_an_adapter_go_the_compositions_that_take_it(pool: AdapterPool, store: FakeStore) -> None:
    both = compose([(key("a"), 0.5), (key("b"), 0.5)])
    store.finish(both)
    pool.acquire(both)
    pool.unload(key("a"))
    assert pool.residents() == [(both, 1)]
    pool.release(both)
    assert pool.residents() == []


def test_who_asks_for_an_adapter_again_before_it_is_gone_keeps_it(pool: AdapterPool, store: FakeStore) -> None:
    store.finish(key("a"))
    pool.acquire(key("a"))
    pool.unload(key("a"))
    assert pool.bring_in(key("a"))
    pool.release(key("a"))
    assert pool.holds(key("a"))


def test_a_pin_ends_the_draining_of_an_adapter(pool: AdapterPool, store: FakeStore) -> None:
    for name in "abc":
        store.finish(key(name))
    for name in "aab":
        pool.acquire(key(name))
    pool.make_room(key("c"))
    pool.pin(key("b"))
    pool.release(key("b"))
    assert pool.holds(key("b"))


def test_an_adapter_that_has_to_leave_counts_as_gone_until_it_is_called_back(
    pool: AdapterPool, store: FakeStore
) -> None:
    for name in "abc":
        store.finish(key(name))
    for name in "aab":
        pool.acquire(key(name))
    pool.moved.clear()
    pool.make_room(key("c"))
    assert (pool.holds(key("b")), pool.bring_in(key("b")), pool.moved) == (False, False, {key("b")})
    pool.moved.clear()
    pool.recall(key("b"))
    assert (pool.holds(key("b")), pool.bring_in(key("b")), pool.moved) == (True, True, {key("b")})


def test_a_composition_that_comes_to_the_device_is_told_of(pool: AdapterPool, store: FakeStore) -> None:
    both = compose([(key("a"), 0.5), (key("b"), 0.5)])
    store.finish(both)
    assert pool.bring_in(both)
    assert pool.moved == {both}


def test_a_pinned_adapter_never_leaves(pool: AdapterPool, store: FakeStore) -> None:
    for name in "abc":
        store.finish(key(name))
    for name in "ab":
        pool.acquire(key(name))
        pool.release(key(name))
    pool.pin(key("a"))
    assert pool.acquire(key("c")) == 1
    assert [resident for resident, _ in pool.residents()] == [key("a"), key("c")]
    pool.unpin(key("a"))
    assert pool.acquire(key("b")) == 0


def test_pins_may_take_half_of_the_slots(make_pool: Callable[..., AdapterPool], store: FakeStore) -> None:
    pool = make_pool(num_slots=4)
    for name in "abc":
        store.finish(key(name))
        pool.acquire(key(name))
    pool.pin(key("a"))
    pool.pin(key("a"))
    pool.pin(key("b"))
    with pytest.raises(AdapterConflict, match="half"):
        pool.pin(key("c"))


def test_pins_may_take_half_of_the_bytes(make_pool: Callable[..., AdapterPool], store: FakeStore) -> None:
    pool = make_pool(num_slots=8, budget_bytes=4 * SLOT_BYTES)
    store.finish(key("a"), rank=3)
    pool.acquire(key("a"))
    with pytest.raises(AdapterConflict, match="half"):
        pool.pin(key("a"))


def test_an_adapter_that_does_not_fit_beside_the_pins_is_refused(
    make_pool: Callable[..., AdapterPool], store: FakeStore
) -> None:
    pool = make_pool(num_slots=8, budget_bytes=4 * SLOT_BYTES)
    store.finish(key("a"), rank=2)
    store.finish(key("b"), rank=3)
    pool.acquire(key("a"))
    pool.pin(key("a"))
    with pytest.raises(AdapterRejected, match="pinned"):
        pool.acquire(key("b"))


def test_what_is_not_on_the_device_cannot_be_pinned(pool: AdapterPool) -> None:
    pool.unpin(key("a"))
    with pytest.raises(AdapterConflict, match="not on the device"):
        pool.pin(key("a"))


def test_making_room_lets_the_adapter_with_the_fewest_requests_drain(pool: AdapterPool, store: FakeStore) -> None:
    for name in "abc":
        store.finish(key(name))
    for name in "aab":
        pool.acquire(key(name))
    pool.make_room(key("c"))
    pool.make_room(key("c"))
    assert pool.acquire(key("a")) == 0
    assert pool.acquire(key("b")) is None  # its steady stream of requests is cut, so that it can leave
    pool.release(key("b"))
    assert pool.acquire(key("c")) == 1
    assert pool.acquire(key("b")) is None  # now it waits like any other


def test_nobody_drains_for_an_adapter_that_could_have_room_or_is_not_read_yet(
    pool: AdapterPool, store: FakeStore
) -> None:
    for name in "abc":
        store.finish(key(name))
    pool.acquire(key("a"))
    pool.acquire(key("b"))
    pool.make_room(key("d"))  # still on its way
    pool.release(key("b"))
    pool.make_room(key("c"))  # b is idle: it leaves without being asked
    assert pool.acquire(key("a")) == 0
    assert pool.acquire(key("c")) == 1


# ---- whatever the order ----------------------------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls keeps the books: slots, bytes, references, tables."""

    names = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.store, self.sites = FakeStore(), {"site": FakeSite(), "other": FakeSite()}
        self.num_slots, self.budget = 3, 6 * SLOT_BYTES
        self.pool = AdapterPool(self.sites, self.store, self.num_slots, self.budget)  # type: ignore[arg-type]
        self.held: list[tuple[AdapterKey, int]] = []

    @rule(name=names)
    def load(self, name: str) -> None:
        self.store.finish(key(name), rank=1 + "abcdef".index(name) // 2, site="site" if name < "d" else "other")

    @rule(name=names)
    def acquire(self, name: str) -> None:
        try:
            slot = self.pool.acquire(key(name))
        except AdapterRejected:
            return
        if slot is not None:
            self.held.append((key(name), slot))
        elif key(name) in self.store.loaded:
            assert self.held, "an idle device has room for everybody"

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))[0])

    @rule(name=names)
    def unload(self, name: str) -> None:
        self.pool.unload(key(name))

    @rule(name=names)
    def pin(self, name: str) -> None:
        try:
            self.pool.pin(key(name))
        except AdapterConflict:
            return

    @rule(name=names)
    def unpin(self, name: str) -> None:
        self.pool.unpin(key(name))

    @rule(name=names)
    def make_room(self, name: str) -> None:
        self.pool.make_room(key(name))

    @invariant()
    def references_are_those_of_requests(self) -> None:
        counts = dict(self.pool.residents())
        for resident, requests in counts.items():
            assert requests == sum(held == resident for held, _ in self.held)
        assert {held for held, _ in self.held} <= counts.keys()

    @invariant()
    def a_held_slot_never_changes_hands(self) -> None:
        by_slot = {slot: held for held, slot in self.held}
        assert all(by_slot[slot] == held for held, slot in self.held)

    @invariant()
    def bytes_and_tables_agree(self) -> None:
        tables = [site.table.slots for site in self.sites.values()]
        assert sum(part.nbytes for table in tables for part in table.values()) == self.pool.used_bytes <= self.budget
        assert sum(map(len, tables)) == len(self.pool.residents()) <= self.num_slots


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_request_waits_for_its_adapter_and_a_wish_does_not(
    store: FakeStore, make_pool: Callable[..., AdapterPool]
) -> None:
    pool = make_pool()
    pool.bring_in(key("a"))
    assert store.ahead is True
    pool.acquire(key("a"))
    assert store.ahead is False
