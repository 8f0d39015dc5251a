"""Prefixes that come back from host memory: the right ones, in time, and nothing is lost or kept by it.

The cache is simulated: what is stored of a token says its salt, its adapter and all tokens up to it, and each step
checks what it reads.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.adapters import AdapterPreparer
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.host_blocks import BlockMoves, Disk, Finished, HostBlocks
from loraplex_engine.scheduling.prefixes import PrefixPreparer
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.scheduler import Scheduler
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan
from tests.engine.scheduling.test_scheduler import FakeClock, FakeSlots, execute, isolated

P = 4
ADAPTERS = (AdapterKey("shared/a", "a" * 64), AdapterKey("shared/b", "b" * 64))
ACTIVATED = AdapterKey("shared/activated", "c" * 64)
INVOCATION = (7, 7)
LONG = list(range(100, 130))


class FakeDisk(Disk):
    """Files that are read and written when the test says so; some cannot be read."""

    def __init__(self, memory: dict[int, dict[int, object]]) -> None:
        self.memory = memory  # of the host, by slot
        self.files: dict[bytes, dict[int, object]] = {}
        self.begun: deque[tuple[bytes, int, bool]] = deque()  # slot, whether it is read
        self.ended: list[Finished] = []
        self.dropped: set[bytes] = set()  # while they were to be written

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self.files

    def write(self, block_hash: bytes, slot: int) -> bool:
        if block_hash in self.files or any(block_hash == each for each, _, _ in self.begun):
            return False
        self.dropped.discard(block_hash)
        self.begun.append((block_hash, slot, False))
        return True

    def read(self, block_hash: bytes, slot: int) -> None:
        assert block_hash in self.files, "only what is there is read"
        self.begun.append((block_hash, slot, True))

    def forget(self, block_hash: bytes) -> None:
        self.files.pop(block_hash, None)
        self.dropped.add(block_hash)

    def finished(self) -> list[Finished]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        pass

    def go_on(self, count: int = 1000, problem: str = "") -> None:
        for _ in range(min(count, len(self.begun))):
            block_hash, slot, is_read = self.begun.popleft()
            if problem or (block_hash not in self.files and is_read):
                self.files.pop(block_hash, None)
                self.ended.append(Finished(block_hash, is_read, problem or "it is gone"))
                self.memory[slot] = {} if is_read else self.memory[slot]
                continue
            if is_read:
                self.memory[slot] = dict(self.files[block_hash])
            elif block_hash not in self.dropped:
                self.files[block_hash] = dict(self.memory[slot])
            self.ended.append(Finished(block_hash, is_read))


class Engine:
    """A scheduler before a simulated cache of three tiers."""

    def __init__(self, num_blocks: int = 16, num_slots: int = 32, most_restored: int = 2, budget: int = 64) -> None:
        self.memory: dict[int, dict[int, object]] = {}  # by slot
        self.disk = FakeDisk(self.memory)
        self.host = HostBlocks(num_slots, self.disk)
        self.blocks = BlockManager(num_blocks, P, True, self.host)
        self.prefixes = PrefixPreparer(self.blocks, self.host, most_restored)
        slots = FakeSlots()
        for key in (*ADAPTERS, ACTIVATED):
            slots.arrive(key)
        slots.invoked_by[ACTIVATED] = INVOCATION
        preparers = [AdapterPreparer(slots), self.prefixes]
        self.scheduler = Scheduler(self.blocks, preparers, 4, budget, num_blocks * P, FakeClock())
        self.device: dict[int, dict[int, object]] = {}  # by block, by place in it
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}  # prompt tokens, by request
        self.num_requests = 0

    def add(self, prompt: list[int], salt: str = "", adapter: AdapterKey | None = None, max_tokens: int = 1) -> Request:
        self.num_requests += 1
        sampling = SamplingParams(seed=0, max_tokens=max_tokens)
        message = AddRequest(self.num_requests, prompt, sampling, adapter, cache_salt=salt)
        request = Request(message, self.num_requests, 0.0)
        self.scheduler.add(request)
        self.tokens[request.request_id] = []
        return request

    def step(self, moves_fail: bool = False, step_fails: bool = False) -> StepPlan:
        self.prefixes.poll()
        plan = self.scheduler.schedule()
        self.move(self.prefixes.moves(idle=not plan.scheduled), moves_fail)
        for item in plan.scheduled if not step_fails else ():
            self.compute(item)
        for item in plan.scheduled if not step_fails else ():  # as layers do, which store before they read
            self.read(item)
        if step_fails:
            self.scheduler.fail_step(plan, "told to")
            plan = StepPlan(())
        for output in self.scheduler.update(plan, execute(plan)):
            self.tokens[output.request_id] += output.token_ids
        return plan

    def compute(self, item: ScheduledRequest) -> None:
        request = item.request
        for at in range(item.num_computed_tokens, item.num_computed_tokens + item.num_new_tokens):
            self.device.setdefault(request.block_ids[at // P], {})[at % P] = stored(request, at)
        self.computed[request.request_id] = self.computed.get(request.request_id, 0) + item.num_new_tokens

    def read(self, item: ScheduledRequest) -> None:
        request = item.request
        for at in range(item.num_computed_tokens):
            found = self.device[request.block_ids[at // P]][at % P]
            assert found == stored(request, at), f"request {request.request_id} reads what is not its own"

    def move(self, moves: BlockMoves, fail: bool) -> None:
        if fail:
            for _, block in moves.restored:
                self.device[block] = {}
            for _, slot in moves.saved:
                self.memory[slot] = {}
            self.prefixes.fail(moves)
            return
        for block, slot in moves.saved:
            self.memory[slot] = dict(self.device.get(block, {}))
        for slot, block in moves.restored:
            self.device[block] = dict(self.memory[slot])
        self.prefixes.write(moves)

    def finish(self) -> None:
        for _ in range(1000):
            if not self.scheduler.requests:
                return
            self.disk.go_on()
            self.step()
        raise AssertionError("requests did not finish")

    def run(self, prompt: list[int], **fields: object) -> Request:
        request = self.add(prompt, **fields)  # type: ignore[arg-type]
        self.finish()
        return request

    def fill(self) -> None:
        """Have others use every block of the device."""
        base = 1000 * (1 + self.num_requests)
        self.run(list(range(base, base + self.blocks.num_blocks * P - 1)))

    def check(self) -> None:
        self.blocks.check()
        self.host.check()
        assert self.host.num_used <= self.host.num_slots


def stored(request: Request, at: int) -> object:
    applies = request.adapter is not None and request.adapter_start is not None and at >= request.adapter_start // P * P
    return request.cache_salt, request.adapter if applies else None, tuple(request.token_ids[: at + 1])


def test_an_evicted_prefix_comes_back_without_being_computed():
    engine = Engine()
    engine.run(LONG)
    engine.fill()
    again = engine.run(LONG)
    assert again.num_cached_tokens == 28
    assert engine.computed[again.request_id] == 2
    engine.check()


def test_others_go_on_while_a_prefix_comes_back():
    engine = Engine(most_restored=1, num_blocks=24)
    engine.run(LONG)
    engine.fill()
    other = engine.add([1, 2, 3], max_tokens=8)
    engine.step()
    engine.add(LONG)
    shares = [[item.request.request_id for item in engine.step().scheduled] for _ in range(6)]
    assert shares == [[other.request_id]] * 6
    engine.finish()


def test_requests_with_the_same_prefix_wait_for_one_copy():
    engine = Engine(most_restored=1)
    engine.run(LONG)
    engine.fill()
    first, second = engine.add(LONG), engine.add([*LONG, 5])
    engine.finish()
    assert [engine.computed[each.request_id] for each in (first, second)] == [2, 3]
    assert engine.prefixes.num_restored == 7


def test_no_prefix_comes_back_to_another_salt_or_adapter():
    engine = Engine()
    engine.run(LONG, salt="tenant-a")
    engine.fill()
    others = [engine.run(LONG, salt="tenant-b"), engine.run(LONG, salt="tenant-a", adapter=ADAPTERS[0])]
    assert [each.num_cached_tokens for each in others] == [0, 0]


def test_activated_lora_gets_the_base_s_blocks_back_from_before_its_invocation():
    engine = Engine()
    prompt = [*LONG[:20], *INVOCATION, *LONG[22:]]
    engine.run(prompt)
    engine.fill()
    assert engine.run(prompt, adapter=ACTIVATED).num_cached_tokens == 20


def test_a_cancelled_request_leaves_nothing_behind():
    engine = Engine(most_restored=1)
    engine.run(LONG)
    engine.fill()
    request = engine.add(LONG)
    for _ in range(2):
        engine.step()
    engine.scheduler.abort(request.request_id)
    engine.disk.go_on()
    engine.prefixes.poll()
    assert engine.blocks.num_used == 0
    assert not engine.host._locks
    engine.check()


def test_a_preempted_request_comes_back_from_the_host():
    engine = Engine(num_blocks=10, budget=64)
    requests = [engine.add([*range(10 * n, 10 * n + 12)], max_tokens=16) for n in range(3)]
    engine.finish()
    assert engine.scheduler.num_preemptions > 0
    assert engine.prefixes.num_restored > 0
    for request in requests:
        assert engine.tokens[request.request_id] == isolated(request.token_ids[:12], 16)


def test_what_could_not_be_copied_is_computed_again():
    engine = Engine()
    engine.run(LONG)
    engine.fill()
    again = engine.add(LONG)
    engine.step(moves_fail=True)
    engine.finish()
    assert engine.tokens[again.request_id] == isolated(LONG, 1)
    engine.check()


def test_no_copy_of_what_is_not_finite_is_used():
    engine = Engine()
    engine.run(LONG)
    engine.fill()
    failed = engine.add(LONG, max_tokens=9)
    while failed.request_id not in engine.computed:
        engine.step()
    engine.scheduler.fail_not_finite([failed], "NaN")
    assert engine.run(LONG).num_cached_tokens == 0


def lose_the_host_s(engine: Engine) -> None:
    """Have others use all of the host's slots, and the disk forget theirs."""
    kept = dict(engine.disk.files)
    for _ in range(4):
        engine.fill()
    engine.disk.go_on()
    engine.prefixes.poll()
    engine.disk.files = kept


def test_a_prefix_comes_back_from_the_disk():
    engine = Engine(num_slots=8)
    engine.run(LONG)
    engine.fill()
    engine.disk.go_on()
    lose_the_host_s(engine)
    again = engine.run(LONG)
    assert (again.num_cached_tokens, engine.computed[again.request_id]) == (28, 2)
    engine.check()


def test_others_go_on_while_the_disk_is_read():
    engine = Engine(num_slots=8, num_blocks=24)
    engine.run(LONG)
    engine.fill()
    engine.disk.go_on()
    lose_the_host_s(engine)
    other = engine.add([1, 2, 3], max_tokens=8)
    engine.step()
    engine.add(LONG)
    shares = [[item.request.request_id for item in engine.step().scheduled] for _ in range(6)]
    assert shares == [[other.request_id]] * 6
    engine.finish()


def test_a_copy_that_gives_way_to_what_is_read_before_it_is_computed():
    engine = Engine(num_slots=6)
    engine.run(LONG)
    engine.fill()
    engine.disk.go_on()
    engine.prefixes.poll()
    wanted = Request(AddRequest(99, LONG, SamplingParams(seed=0, max_tokens=1)), 99, 0.0)
    first, *others = engine.blocks.reusable(wanted)
    engine.disk.files = {first: engine.disk.files[first]}
    engine.host.forget(first)
    engine.host.reserve(b"of another prefix")  # what is read takes the place of one that the host alone has
    assert [engine.host.slot(each) is not None for each in others] == [True] * 5 + [False]
    again = engine.run(LONG)
    assert engine.tokens[again.request_id] == isolated(LONG, 1)
    assert again.num_cached_tokens > 0
    engine.check()


def test_what_the_disk_cannot_read_is_computed():
    engine = Engine(num_slots=8)
    engine.run(LONG)
    engine.fill()
    engine.disk.go_on()
    lose_the_host_s(engine)
    again = engine.add(LONG)
    engine.step()
    engine.disk.go_on(problem="was damaged")
    engine.finish()
    assert engine.tokens[again.request_id] == isolated(LONG, 1)
    engine.check()


def test_nothing_is_copied_into_a_slot_that_somebody_else_fills():
    host = HostBlocks(1)
    host.save(b"evicted", 3)
    assert host.reserve(b"read meanwhile") == 0
    assert host.take_saved() == {}
    assert host.num_saved == 0


def test_what_is_used_again_is_on_the_disk_before_it_is_evicted():
    engine = Engine()
    engine.run(LONG)
    engine.run(LONG)
    engine.run([1, 2, 3], max_tokens=6)  # a few blocks are copied before each step
    engine.disk.go_on()
    first = Request(AddRequest(99, LONG, SamplingParams(seed=0, max_tokens=1)), 99, 0.0)
    assert all(name in engine.disk for name in engine.blocks.reusable(first))
    assert all(engine.blocks.find(name) is not None for name in engine.blocks.reusable(first))


def test_a_prefix_is_written_from_its_beginning():
    engine = Engine()
    engine.run(LONG)
    names = engine.blocks.reusable(Request(AddRequest(99, LONG, SamplingParams(seed=0, max_tokens=1)), 99, 0.0))
    engine.blocks.evict_all()
    engine.move(engine.prefixes.moves(idle=True), fail=False)
    assert [name for name, _, _ in engine.disk.begun] == names


def test_no_copy_outlives_a_step_that_failed():
    engine = Engine()
    request = engine.add(LONG)
    plan = engine.scheduler.schedule()
    names = engine.blocks.reusable(request)
    engine.host.save(names[0], request.block_ids[0])  # as before the next step, where that starts before this one ends
    engine.scheduler.fail_step(plan, "told to")
    assert engine.host.slot(names[0]) is None


class Lives(RuleBasedStateMachine):
    """Requests of all salts and adapters, in a cache that is too small for them."""

    @initialize(
        num_blocks=st.sampled_from([10, 16]),
        num_slots=st.sampled_from([1, 6, 40]),
        most_restored=st.sampled_from([1, 3, 50]),
        budget=st.sampled_from([5, 64]),
    )
    def begin(self, num_blocks: int, num_slots: int, most_restored: int, budget: int) -> None:
        self.engine = Engine(num_blocks, num_slots, most_restored, budget)
        self.asked: dict[int, tuple[list[int], int]] = {}

    @rule(
        length=st.integers(1, 26),
        first=st.sampled_from([0, 100]),
        invoked=st.booleans(),
        salt=st.sampled_from(["", "a", "b"]),
        adapter=st.sampled_from([None, *ADAPTERS, ACTIVATED]),
        max_tokens=st.integers(1, 9),
    )
    def generate(
        self, length: int, first: int, invoked: bool, salt: str, adapter: AdapterKey | None, max_tokens: int
    ) -> None:
        prompt = list(range(first, first + length))
        if invoked:
            prompt[9:11] = INVOCATION
        request = self.engine.add(prompt, salt, adapter, max_tokens)
        self.asked[request.request_id] = prompt, max_tokens

    @rule(count=st.integers(1, 6))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(count=st.integers(1, 9), problem=st.sampled_from(["", "", "", "was damaged"]))
    def read_and_write(self, count: int, problem: str) -> None:
        self.engine.disk.go_on(count, problem)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(index=st.integers(0, 20))
    def compute_nan(self, index: int) -> None:
        running = self.engine.scheduler.running
        request = running[index % len(running)]
        self.engine.scheduler.fail_not_finite([request], "NaN")
        del self.asked[request.request_id]

    @rule(moves=st.booleans())
    def fail(self, moves: bool) -> None:
        before = set(self.engine.scheduler.requests)
        self.engine.step(moves_fail=moves, step_fails=not moves)
        for request_id in before - self.engine.scheduler.requests.keys() if not moves else ():
            del self.asked[request_id]

    @precondition(lambda self: self.engine.scheduler.requests)
    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
        known = sorted(self.engine.scheduler.requests)
        request_id = known[index % len(known)]
        self.engine.scheduler.abort(request_id)
        self.asked.pop(request_id)

    @invariant()
    def nothing_is_lost_and_no_budget_exceeded(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.finish()
        for request_id, (prompt, max_tokens) in self.asked.items():
            assert self.engine.tokens[request_id] == isolated(prompt, max_tokens)
        self.engine.disk.go_on()
        self.engine.prefixes.poll()
        assert self.engine.blocks.num_used == 0
        assert not self.engine.host._locks


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
