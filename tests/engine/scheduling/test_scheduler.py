"""The scheduler's policy and its invariants, without a model: a fake runner makes up the tokens."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex_adapters.errors import COLD, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest, RequestOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.adapters import AdapterPreparer
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.request import Request, RequestState
from loraplex_engine.scheduling.scheduler import Scheduler
from loraplex_engine.scheduling.step import SampledToken, StepPlan, StepResult

P = 4
EOS = 2


class FakeSlots:
    """Adapters that are there when the test says so."""

    def __init__(self) -> None:
        self.changes = 0
        self.resident: dict[AdapterKey, int] = {}
        self.broken: set[AdapterKey] = set()
        self.references: Counter[AdapterKey] = Counter()
        self.wanted: list[AdapterKey] = []
        self.with_heads: set[AdapterKey] = set()
        self.invoked_by: dict[AdapterKey, tuple[int, ...]] = {}

    def make_room(self, key: AdapterKey) -> None:
        self.wanted.append(key)

    def arrive(self, key: AdapterKey) -> None:
        self.resident[key] = len(self.resident)
        self.changes += 1

    def break_down(self, key: AdapterKey) -> None:
        self.broken.add(key)
        self.changes += 1

    def leaves_cache(self, key: AdapterKey) -> bool:
        return False

    def has_head(self, key: AdapterKey) -> bool:
        return key in self.with_heads

    def acquire(self, key: AdapterKey) -> int | None:
        if key in self.broken:
            raise AdapterRejected([f"{key} is broken"])
        if key not in self.resident:
            return None
        self.references[key] += 1
        return self.resident[key]

    def invocation_tokens(self, key: AdapterKey) -> tuple[int, ...]:
        assert self.references[key] > 0
        return self.invoked_by.get(key, ())

    def release(self, key: AdapterKey) -> None:
        assert self.references[key] > 0
        self.references[key] -= 1


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def token_after(tokens: list[int]) -> int:
    """A next token that depends on the whole sequence, so that a lost or doubled token shows."""
    return 10 + (sum(tokens) * 31 + len(tokens)) % 1000


def execute(plan: StepPlan) -> StepResult:
    sampled = [
        (SampledToken(token_after(item.request.token_ids), None),) if item.samples else () for item in plan.scheduled
    ]
    return StepResult(tuple(sampled), {})


class Bench:
    """A scheduler with everything around it faked."""

    def __init__(
        self, num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 16, prefix_caching: bool = True
    ) -> None:
        self.slots = FakeSlots()
        self.clock = FakeClock()
        self.blocks = BlockManager(num_blocks, P, prefix_caching)
        self.scheduler = Scheduler(
            self.blocks, [AdapterPreparer(self.slots)], max_num_seqs, budget, num_blocks * P, self.clock
        )
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.arrivals = 0

    def add(self, request_id: int, prompt: list[int], **fields: object) -> Request:
        adapter = fields.pop("adapter", None)
        names = ("priority", "tenant", "weight", "adapter_wait_seconds")
        place = {name: fields.pop(name) for name in names if name in fields}
        sampling = SamplingParams(**({"seed": 0, "max_tokens": 3} | fields))  # type: ignore[arg-type]
        message = AddRequest(request_id, prompt, sampling, adapter, **place)  # type: ignore[arg-type]
        self.arrivals += 1
        request = Request(message, self.arrivals, self.clock())
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for output in self.scheduler.update(plan, execute(plan)):
            self.outputs.setdefault(output.request_id, []).append(output)
        return plan

    def finish(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.requests:
                return
            self.step()
        raise AssertionError("requests did not finish")

    def tokens(self, request_id: int) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def reason(self, request_id: int) -> FinishReason | None:
        return self.outputs[request_id][-1].finish_reason


def isolated(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(token_after(tokens))
    return tokens[len(prompt) :]


KEY = AdapterKey("shared/pirate", "a" * 64)


def test_long_prompt_is_computed_in_chunks_beside_a_decoding_request():
    bench = Bench(budget=8)
    bench.add(1, [5, 6], max_tokens=10)
    bench.step()
    bench.add(2, list(range(20, 40)), max_tokens=2)
    shares = [{item.request.request_id: item.num_new_tokens for item in bench.step().scheduled} for _ in range(3)]
    assert shares == [{1: 1, 2: 7}, {1: 1, 2: 7}, {1: 1, 2: 6}]
    bench.finish()
    assert bench.tokens(2) == isolated(list(range(20, 40)), 2)


def test_preempted_requests_continue_where_they_were():
    bench = Bench(num_blocks=6, budget=64)
    prompts = {i: [i * 10 + j for j in range(6)] for i in range(1, 4)}
    for i, prompt in prompts.items():
        bench.add(i, prompt, max_tokens=12)
    bench.finish()
    assert bench.scheduler.num_preemptions > 0
    assert {i: bench.tokens(i) for i in prompts} == {i: isolated(p, 12) for i, p in prompts.items()}
    assert bench.blocks.num_used == 0


def test_a_request_that_draws_nothing_takes_its_prefix_from_the_cache_and_says_how_it_began():
    bench = Bench()
    prompt = list(range(20, 32))
    bench.add(1, prompt)
    bench.finish()
    bench.add(2, prompt, max_tokens=0)
    bench.finish()
    [output] = bench.outputs[2]
    assert (output.token_ids, output.finish_reason) == ([], FinishReason.MAX_TOKENS)
    assert (output.num_cached_tokens, output.queue_seconds) == (8, 0.0)
    assert bench.blocks.num_used == 0


def test_lower_priority_number_runs_first():
    bench = Bench(max_num_seqs=1)
    bench.add(1, [5], priority=5)
    bench.add(2, [6], priority=1)
    assert [item.request.request_id for item in bench.step().scheduled] == [2]


def test_waiting_for_an_adapter_holds_up_nobody_else():
    bench = Bench()
    waiting = bench.add(1, [5], adapter=KEY)
    bench.add(2, [6])
    plan = bench.step()
    assert [item.request.request_id for item in plan.scheduled] == [2]
    assert waiting.state is RequestState.WAITING_FOR_RESOURCE
    bench.slots.arrive(KEY)
    assert 1 in [item.request.request_id for item in bench.step().scheduled]
    bench.finish()
    assert bench.slots.references[KEY] == 0


def test_room_is_made_for_whoever_waits_too_long():
    bench = Bench()
    bench.add(1, [5], adapter=KEY)
    bench.step()
    bench.step()
    assert bench.slots.wanted == []
    bench.clock.now = 2.1
    bench.step()
    assert bench.slots.wanted == [KEY]


def test_a_broken_adapter_fails_its_requests_alone():
    bench = Bench()
    bench.add(1, [5], adapter=KEY)
    bench.add(2, [6], adapter=KEY)
    bench.add(3, [7])
    bench.step()
    bench.slots.break_down(KEY)
    bench.finish()
    assert bench.reason(1) is bench.reason(2) is FinishReason.ERROR
    assert "is broken" in bench.outputs[1][-1].error
    assert bench.reason(3) is FinishReason.MAX_TOKENS


def test_rows_of_one_adapter_are_adjacent_and_base_rows_first():
    bench = Bench()
    other = AdapterKey("shared/other", "b" * 64)
    bench.slots.arrive(KEY)
    bench.slots.arrive(other)
    for i, adapter in enumerate([other, None, KEY, other, None, KEY]):
        bench.add(i, [5 + i], adapter=adapter)
    slots = [item.request.adapter_slot for item in bench.step().scheduled]
    assert slots == [None, None, 0, 0, 1, 1]


@pytest.mark.parametrize("adapter", [None, KEY])
def test_abort_frees_everything_in_every_state(adapter):
    bench = Bench(max_num_seqs=1)
    bench.slots.arrive(KEY)
    bench.add(1, list(range(5, 30)), adapter=adapter, max_tokens=50)  # prefilling after one step
    bench.add(2, [6], adapter=adapter)  # waiting
    bench.add(3, [7], adapter=AdapterKey("shared/absent", "c" * 64))
    bench.step()
    for request_id in (1, 2, 3):
        assert bench.scheduler.abort(request_id)
    assert not bench.scheduler.abort(1)
    assert not bench.scheduler.requests
    assert bench.blocks.num_used == 0
    assert +bench.slots.references == Counter()
    assert not bench.scheduler.adapter_users


def test_time_limit_ends_with_what_there_is():
    bench = Bench()
    bench.add(1, [5], max_tokens=50, time_limit_seconds=10.0)
    bench.step()
    bench.clock.now = 11.0
    bench.step()
    assert bench.reason(1) is FinishReason.TIME_LIMIT
    assert bench.tokens(1) == isolated([5], 1)


def test_time_limit_before_the_first_token_gives_what_was_computed():
    entry = TokenLogprobs(6, -0.5, 1, [], [])
    bench = Bench(budget=2)
    bench.add(1, [5, 6, 7], num_prompt_logprobs=0, time_limit_seconds=10.0)
    bench.clock.now = 3.0
    plan = bench.scheduler.schedule()
    bench.scheduler.update(plan, StepResult(((),), {1: [entry]}))
    bench.clock.now = 11.0
    bench.step()
    [output] = bench.outputs[1]
    assert (output.finish_reason, output.token_ids) == (FinishReason.TIME_LIMIT, [])
    assert output.prompt_logprobs == [None, entry]
    assert output.queue_seconds == 3.0


def test_what_never_ran_has_no_time_in_which_it_began():
    bench = Bench()
    bench.add(1, [5], adapter=KEY, time_limit_seconds=10.0)
    bench.step()
    bench.clock.now = 11.0
    bench.step()
    [output] = bench.outputs[1]
    assert (output.finish_reason, output.queue_seconds) == (FinishReason.TIME_LIMIT, None)


def test_a_request_waits_for_its_adapter_as_long_as_it_may():
    bench = Bench()
    bench.add(1, [5], adapter=KEY, adapter_wait_seconds=2.0)
    bench.add(2, [5], adapter=KEY)
    bench.step()
    bench.clock.now = 1.9
    bench.step()
    assert bench.outputs == {}
    bench.clock.now = 2.0
    bench.step()
    [output] = bench.outputs.pop(1)
    assert (output.finish_reason, output.error_reason) == (FinishReason.ERROR, COLD)
    assert bench.outputs == {}


def test_the_wait_for_an_adapter_begins_when_it_is_the_requests_turn():
    bench = Bench(max_num_seqs=1)
    bench.add(1, [5], max_tokens=3)
    bench.add(2, [5], adapter=KEY, adapter_wait_seconds=2.0)
    for bench.clock.now in (0.0, 5.0, 6.0):
        bench.step()
    bench.slots.arrive(KEY)
    bench.clock.now = 7.0
    bench.finish()
    assert bench.reason(2) is FinishReason.MAX_TOKENS


def test_an_adapter_that_comes_as_the_wait_ends_is_used():
    bench = Bench()
    bench.add(1, [5], adapter=KEY, adapter_wait_seconds=2.0)
    bench.step()
    bench.slots.arrive(KEY)
    bench.clock.now = 3.0
    bench.finish()
    assert bench.reason(1) is FinishReason.MAX_TOKENS


def test_the_time_in_which_others_ran_is_no_wait_for_the_adapter():
    bench = Bench(max_num_seqs=1)
    bench.add(1, [5], max_tokens=1)
    bench.add(2, [5], adapter=KEY)
    bench.step()
    bench.clock.now = 5.0
    bench.step()
    bench.slots.arrive(KEY)
    bench.clock.now = 7.0
    bench.finish()
    assert (bench.outputs[2][0].queue_seconds, bench.outputs[2][0].adapter_load_seconds) == (7.0, 2.0)


def test_stop_token_counts_only_after_min_tokens():
    prompt = [5]
    first, second = isolated(prompt, 2)
    bench = Bench()
    bench.add(1, prompt, max_tokens=9, stop_token_ids=(first, second), min_tokens=2)
    bench.finish()
    assert bench.reason(1) is FinishReason.STOP
    assert bench.tokens(1) == [first, second]


def test_a_request_takes_several_tokens_of_a_step_up_to_the_one_that_ends_it():
    bench = Bench()
    request = bench.add(1, [5], max_tokens=9, stop_token_ids=(8,))
    drawn = tuple(SampledToken(token, TokenLogprobs(token, -0.5, 1, [], [])) for token in (6, 7, 8, 9))
    [output] = bench.scheduler.update(bench.scheduler.schedule(), StepResult((drawn[:2],), {}))
    assert (output.token_ids, output.finish_reason) == ([6, 7], None)
    [output] = bench.scheduler.update(bench.scheduler.schedule(), StepResult((drawn[1:],), {}))
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == ([7, 8], FinishReason.STOP, 8)
    assert output.logprobs is not None
    assert [one.token_id for one in output.logprobs] == [7, 8]
    assert request.token_ids == [5, 6, 7, 7, 8]
    assert bench.scheduler.generated_tokens == 4
    bench.blocks.check()


def test_tokens_that_were_drawn_ahead_are_computed_by_the_next_step():
    bench = Bench()
    bench.add(1, [5])
    bench.scheduler.update(
        bench.scheduler.schedule(), StepResult(((SampledToken(6, None), SampledToken(7, None)),), {})
    )
    [item] = bench.scheduler.schedule().scheduled
    assert (item.num_computed_tokens, item.num_new_tokens, item.samples) == (1, 2, True)


def update_with_drafts(bench: Bench, drafts: tuple[int, ...], drawn: tuple[int, ...]) -> None:
    [item] = bench.scheduler.schedule().scheduled
    assert bench.blocks.grow(item.request, item.request.num_tokens + len(drafts))
    sampled = tuple(SampledToken(token, None) for token in drawn)
    bench.scheduler.update(StepPlan((item._replace(draft_token_ids=drafts),)), StepResult((sampled,), {}))


def test_drafts_that_were_drawn_are_computed_already_and_their_blocks_found():
    bench = Bench()
    bench.add(1, [5], max_tokens=20)
    update_with_drafts(bench, drafts=(6, 7, 8, 9, 0), drawn=(6, 7, 8, 9, 4))
    [item] = bench.scheduler.schedule().scheduled
    assert (item.num_computed_tokens, item.num_new_tokens) == (5, 1)
    other = bench.add(2, [5, 6, 7, 8, 3])
    bench.scheduler.schedule()
    assert other.num_cached_tokens == P
    bench.blocks.check()


def test_nobody_finds_a_block_with_a_draft_that_was_not_drawn():
    bench = Bench()
    bench.add(1, [5], max_tokens=20)
    update_with_drafts(bench, drafts=(6, 7, 8), drawn=(6, 7, 9))
    other = bench.add(2, [5, 6, 7, 8, 3])
    bench.scheduler.schedule()
    assert other.num_cached_tokens == 0


def test_drafts_after_the_token_that_ends_a_request_are_forgotten():
    bench = Bench()
    bench.add(1, [5], max_tokens=20, eos_token_ids=(EOS,))
    update_with_drafts(bench, drafts=(6, EOS, 8), drawn=(6, EOS, 8, 9))
    assert bench.scheduler.generated_tokens == 2
    assert not bench.scheduler.requests
    assert bench.blocks.num_used == 0


def test_context_limit_ends_an_output():
    bench = Bench(num_blocks=2)
    bench.add(1, [5] * 6, max_tokens=50)
    bench.finish()
    assert bench.reason(1) is FinishReason.CONTEXT_LIMIT
    assert len(bench.tokens(1)) == 2


def test_equal_prompts_in_one_step_are_computed_once():
    bench = Bench(budget=64)
    for i in range(3):
        bench.add(i, list(range(50, 62)))
    plan = bench.step()
    assert sorted(item.num_new_tokens for item in plan.scheduled) == [4, 4, 12]


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, aborts and adapters in any order: nothing leaks and every output equals the isolated run."""

    @initialize(num_blocks=st.integers(5, 12), seqs=st.integers(1, 5), budget=st.integers(1, 24), caching=st.booleans())
    def setup(self, num_blocks: int, seqs: int, budget: int, caching: bool) -> None:
        self.bench = Bench(num_blocks, seqs, budget, caching)
        self.expected: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=12),
        max_tokens=st.integers(1, 8),
        adapter=st.sampled_from([None, None, KEY, AdapterKey("shared/b", "b" * 64)]),
        priority=st.integers(0, 1),
        tenant=st.sampled_from(["a", "b"]),
    )
    def add(self, prompt: list[int], max_tokens: int, adapter: AdapterKey | None, priority: int, tenant: str) -> None:
        self.next_id += 1
        self.bench.add(self.next_id, prompt, max_tokens=max_tokens, adapter=adapter, priority=priority, tenant=tenant)
        self.expected[self.next_id] = isolated(prompt, max_tokens)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    @rule(data=st.data())
    @precondition(lambda self: self.bench.scheduler.requests)
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.bench.scheduler.requests)))
        self.bench.scheduler.abort(request_id)
        del self.expected[request_id]

    @rule(key=st.sampled_from([KEY, AdapterKey("shared/b", "b" * 64)]))
    def adapter_arrives(self, key: AdapterKey) -> None:
        if key not in self.bench.slots.resident:
            self.bench.slots.arrive(key)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "bench"):
            return
        scheduler, blocks = self.bench.scheduler, self.bench.blocks
        blocks.check()
        held = Counter(block for request in scheduler.requests.values() for block in request.block_ids)
        assert len(held) == blocks.num_used
        holders = Counter(r.adapter for r in scheduler.requests.values() if r.adapter_slot is not None)
        assert holders == +self.bench.slots.references
        set_aside = len(scheduler.requests) - len(scheduler.running) - len(scheduler.waiting)
        assert set_aside == sum(len(room) for room in scheduler.rooms)
        assert scheduler.running == sorted(scheduler.running, key=lambda request: request.order)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        for key in (KEY, AdapterKey("shared/b", "b" * 64)):
            self.adapter_arrives(key)
        self.bench.finish()
        for request_id, tokens in self.expected.items():
            got = self.bench.tokens(request_id)
            assert got == tokens[: len(got)]
            if self.bench.reason(request_id) is FinishReason.MAX_TOKENS:
                assert got == tokens
            else:
                assert self.bench.reason(request_id) is FinishReason.CONTEXT_LIMIT
        assert self.bench.blocks.num_used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
