"""Drafts in the scheduler's plans, without a model: a fake runner makes up the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_engine.drafting.costs import StepCosts
from loraplex_engine.drafting.drafting import Drafting
from loraplex_engine.drafting.source import FREE as FREE_TO_MAKE
from loraplex_engine.drafting.source import Costs, Source
from loraplex_engine.link.drafts import DraftKind, Drafts
from loraplex_engine.link.messages import AddRequest, RequestOutput
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.scheduler import Scheduler
from loraplex_engine.scheduling.step import SampledToken, StepPlan, StepResult
from tests.engine.scheduling.test_scheduler import isolated, token_after

P, EOS = 4, 2
FREE = {1: 1.0, 1000: 1.0}  # seconds by rows


def drawn(known: Sequence[int], drafts: Sequence[int]) -> tuple[SampledToken, ...]:
    tokens: list[int] = []
    for place in range(len(drafts) + 1):
        tokens.append(token_after([*known, *tokens]))
        if place < len(drafts) and drafts[place] != tokens[-1]:
            break
    return tuple(SampledToken(token, None) for token in tokens)


def execute(plan: StepPlan) -> StepResult:
    sampled = [drawn(item.request.token_ids, item.draft_token_ids) if item.samples else () for item in plan.scheduled]
    return StepResult(tuple(sampled), {})


class Oracle(Source):
    """Drafts of which each `wrong`-th is wrong; 0: none is."""

    is_free = False

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.asked = wrong, 0
        self.forgotten: list[int] = []

    def costs(self, request: Request, num_requests: int, token_seconds: float) -> Costs:
        return FREE_TO_MAKE

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> dict[int, Sequence[int]]:
        return {key: [self.token(request, place) for place in range(count)] for key, (request, count) in wanted.items()}

    def token(self, request: Request, place: int) -> int:
        tokens = list(request.token_ids)
        for _ in range(place + 1):
            tokens.append(token_after(tokens))
        self.asked += 1
        return 0 if self.wrong and self.asked % self.wrong == 0 else tokens[-1]

    def forget(self, request: Request) -> None:
        self.forgotten.append(request.request_id)


class Bench:
    """A scheduler whose requests may have drafts."""

    def __init__(
        self, num_blocks: int = 64, budget: int = 16, most_drawn: int = 16, times: dict[int, float] = FREE
    ) -> None:
        self.source = Oracle()
        self.blocks = BlockManager(num_blocks, P, enable_prefix_caching=True)
        self.now = 0.0
        self.times, self.costs = StepCosts(times), StepCosts(times)
        self.drafting = Drafting(
            self.blocks, {DraftKind.NGRAM: self.source}, self.costs, most_drawn, num_blocks * P, lambda: self.now
        )
        self.scheduler = Scheduler(
            self.blocks, [], 8, budget, num_blocks * P, clock=lambda: self.now, drafter=self.drafting
        )
        self.outputs: dict[int, list[RequestOutput]] = {}

    def add(self, request_id: int, prompt: list[int], drafts: int = 8, **fields: object) -> Request:
        sampling = SamplingParams(**({"seed": 0, "max_tokens": 30} | fields))  # type: ignore[arg-type]
        message = AddRequest(request_id, prompt, sampling, drafts=Drafts(DraftKind.NGRAM, drafts))
        request = Request(message, request_id, 0.0)
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.now += self.times.seconds(plan.num_tokens)
        for output in self.scheduler.update(plan, execute(plan)):
            self.outputs.setdefault(output.request_id, []).append(output)
        return plan

    def finish(self) -> list[StepPlan]:
        plans = []
        while self.scheduler.requests:
            plans.append(self.step())
        return plans

    def tokens(self, request_id: int) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


def test_right_drafts_save_steps() -> None:
    bench = Bench()
    bench.add(1, [5, 6, 7])
    assert len(bench.finish()) < 10
    assert bench.tokens(1) == isolated([5, 6, 7], 30)


@pytest.mark.parametrize("is_free", [True, False])
def test_guesses_that_would_have_been_right_bring_drafts_back(is_free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Oracle, "is_free", is_free)
    bench = Bench(num_blocks=128, times={1: 1.0, 2: 1.45, 9: 1.9})  # the first draft takes what may be lost
    bench.source.wrong = 1
    bench.add(1, [5, 6, 7], max_tokens=100)
    while not bench.scheduler.draft_tokens:
        bench.step()
    bench.source.wrong = 0
    steps = len(bench.finish())
    assert steps < 30 if is_free else steps > 60
    assert bench.tokens(1) == isolated([5, 6, 7], 100)


def test_outputs_say_how_many_drafts_were_tried_and_how_many_were_right() -> None:
    bench = Bench()
    bench.source.wrong = 3
    bench.add(1, [5, 6, 7])
    plans = bench.finish()
    tried = sum(len(item.draft_token_ids) for plan in plans for item in plan.scheduled)
    right = sum(len(output.token_ids) - 1 for output in bench.outputs[1])
    told = [(output.num_drafts, output.num_accepted_drafts) for output in bench.outputs[1]]
    assert (tried, right) == tuple(map(sum, zip(*told, strict=True)))
    assert (tried, right) == (bench.scheduler.draft_tokens, bench.scheduler.accepted_draft_tokens)
    assert 0 < right < tried


def test_no_draft_follows_what_ends_the_output() -> None:
    bench = Bench()
    request = bench.add(1, [5, 6, 7], max_tokens=6)
    bench.finish()
    assert len(bench.tokens(1)) == 6
    assert request.finish_reason is FinishReason.MAX_TOKENS
    assert bench.scheduler.draft_tokens == bench.scheduler.accepted_draft_tokens


def test_drafts_behind_a_token_that_ends_the_output_are_not_part_of_it() -> None:
    bench = Bench()
    expected = isolated([5, 6, 7], 30)
    request = bench.add(1, [5, 6, 7], stop_token_ids=(expected[9],))
    bench.finish()
    assert bench.tokens(1) == expected[:10]
    assert request.finish_reason is FinishReason.STOP


def test_a_request_without_drafts_gets_none_beside_one_that_has_some() -> None:
    bench = Bench()
    bench.add(1, [5, 6, 7], drafts=0)
    bench.add(2, [8, 9])
    plans = bench.finish()
    drafted = {item.request.request_id for plan in plans for item in plan.scheduled if item.draft_token_ids}
    assert drafted == {2}


def test_a_request_gets_no_more_drafts_than_it_asks_for() -> None:
    bench = Bench()
    bench.add(1, [5, 6, 7], drafts=2)
    assert max(len(item.draft_token_ids) for plan in bench.finish() for item in plan.scheduled) == 2


def test_prompts_come_before_drafts() -> None:
    bench = Bench(budget=8)
    bench.add(1, [5, 6, 7])
    for _ in range(3):
        bench.step()
    bench.add(2, list(range(20)))
    plan = bench.step()
    assert {item.request.request_id: item.num_rows for item in plan.scheduled} == {1: 1, 2: 7}


def test_drafts_that_do_not_pay_stop() -> None:
    bench = Bench(times={1: 1.0, 2: 1.2, 3: 1.4, 9: 2.6})
    bench.source.wrong = 1
    bench.add(1, [5, 6, 7], max_tokens=200)
    plans = bench.finish()
    assert sum(len(item.draft_token_ids) for plan in plans for item in plan.scheduled) <= 8


def test_the_times_of_steps_decide_how_many_drafts_pay() -> None:
    bench = Bench(times={1: 1.0, 9: 9.0})
    bench.add(1, [5, 6, 7], max_tokens=200)
    bench.finish()
    assert bench.scheduler.draft_tokens == 0


def test_only_steps_that_decode_tell_what_rows_cost() -> None:
    bench = Bench()
    bench.add(1, [5, 6, 7], drafts=0)
    for seconds in (50.0, 3.0, 3.0):
        plan = bench.scheduler.schedule()
        bench.now += seconds
        bench.scheduler.update(plan, execute(plan))
    assert bench.costs.seconds(1) == 3.0


def test_what_is_kept_of_a_request_goes_with_it() -> None:
    bench = Bench()
    bench.add(1, [5, 6, 7])
    bench.add(2, [5, 6, 7])
    for _ in range(3):
        bench.step()
    bench.scheduler.abort(2)
    bench.finish()
    assert sorted(bench.source.forgotten) == [1, 2]
    assert not bench.drafting._accounts


@settings(deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=20), min_size=1, max_size=6),
    num_blocks=st.integers(14, 40),
    budget=st.integers(3, 24),
    most_drawn=st.integers(8, 24),
    wrong=st.integers(0, 4),
)
def test_drafts_keep_to_the_steps_limits_and_publish_no_block_that_was_not_drawn(
    prompts: list[list[int]], num_blocks: int, budget: int, most_drawn: int, wrong: int
) -> None:
    bench = Bench(num_blocks, budget, most_drawn)
    bench.source.wrong = wrong
    requests = [bench.add(number, prompt) for number, prompt in enumerate(prompts)]
    while bench.scheduler.requests:
        plan = bench.step()
        assert plan.num_tokens <= budget
        assert sum(1 + len(item.draft_token_ids) for item in plan.scheduled if item.samples) <= most_drawn
        bench.blocks.check()
        for request in requests:
            undrawn = request.block_ids[request.num_computed_tokens // P :]
            assert all(bench.blocks._hash_of[block] is None for block in undrawn)
    for number, prompt in enumerate(prompts):
        assert bench.tokens(number) == isolated(prompt, 30)
    assert bench.blocks.num_used == 0


@pytest.mark.parametrize("wrong", [0, 2])
def test_tenants_are_charged_for_tokens_and_not_for_drafts(wrong: int) -> None:
    bench, plain = Bench(), Bench()
    bench.source.wrong = wrong
    bench.add(1, [5, 6, 7])
    plain.add(1, [5, 6, 7], drafts=0)
    bench.finish()
    plain.finish()
    assert bench.scheduler.waiting.served("") == plain.scheduler.waiting.served("")
