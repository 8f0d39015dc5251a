"""Decides which requests run next. This policy is in no other file.

Iteration-level (continuous) batching: every step takes the requests that are ready, within a budget of tokens. Running
requests go first, so that a stream once begun keeps flowing; a long prompt is computed in chunks that fill the
rest. Fairness between tenants (`fairness`) decides which requests join them next.
Source: Orca (OSDI 2022), Sarathi-Serve (arXiv 2403.02310), vLLM V1's unified schedule.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.grammar import UNUSABLE_FORM
from loraplex_engine.link.messages import RequestOutput
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_engine.scheduling.beam_search import BeamSearch
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.drafter import Drafter, NoDrafts
from loraplex_engine.scheduling.fairness import FairQueue
from loraplex_engine.scheduling.form import NOTHING_FITS
from loraplex_engine.scheduling.request import Request, RequestState
from loraplex_engine.scheduling.resources import NeverReadyError, Preparer, WaitingRoom
from loraplex_engine.scheduling.step import SampledToken, ScheduledRequest, StepPlan, StepResult

TOO_WIDE = "the cache has too few blocks for its beams: search with fewer, or for shorter outputs"


class Scheduler:
    """Decides which requests run, keeps their states, and turns results into outputs. Knows no tensors."""

    def __init__(
        self,
        blocks: BlockManager,
        preparers: Sequence[Preparer],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.clock = clock
        self.drafter = drafter or NoDrafts()

        self.requests: dict[int, Request] = {}  # all unfinished requests
        self.running: list[Request] = []  # in order of turn
        self.waiting = FairQueue()
        # A request passes them in this order, and holds what it was given in one while it waits in the next.
        self.rooms = [WaitingRoom(preparer, clock) for preparer in preparers]
        self._num_lasting = sum(room.outlasts_blocks for room in self.rooms)
        self.adapter_users: Counter[AdapterKey] = Counter()  # accepted requests by adapter version, wherever they are
        self._deadlines: list[tuple[float, int]] = []  # of requests
        self._outputs: list[RequestOutput] = []  # ends outside of a step; `update` returns them
        self.num_preemptions = 0
        self.num_not_finite = 0  # requests that ended so
        self.num_forms_failed = 0  # requests that ended because of their form
        self.prompt_tokens = 0  # computed, cumulative
        self.generated_tokens = 0
        self.draft_tokens = 0  # computed, cumulative
        self.accepted_draft_tokens = 0  # of these, drawn as well

    # ---- arrivals and departures -----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        if request.adapter is not None:
            self.adapter_users.update(request.adapter.members)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
        self.waiting.push(request)

    def abort(self, request_id: int) -> bool:
        """Drop a request, in whatever state; its blocks and its adapter are free at once. False if there is none."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.CANCELLED)
        return True

    # ---- one step --------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Choose the requests to run and their tokens, and reserve blocks for them. The plan may be empty."""
        self._expire()
        self._end_waits()
        budget = self.max_num_batched_tokens
        scheduled: list[ScheduledRequest] = []
        preempted = False

        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            shares = self._shares(request, budget)
            while not self._grow(shares):
                preempted = True
                victim = max(self.running[index:], key=self._claim)
                if victim is request and request.search is not None and len(self.running) == 1:
                    self.fail(request, TOO_WIDE)
                    break
                self.running.remove(victim)
                self._preempt(victim)
                if victim is request:
                    break
            if request.state is not RequestState.RUNNING:
                continue  # the next one has this index now
            for each, num_new in shares:
                scheduled.append(self._scheduled(each, num_new))
                budget -= num_new
            index += 1

        if not preempted:  # else blocks are short: whoever was preempted comes first
            self._admit(scheduled, budget)
        scheduled.sort(key=lambda item: -1 if item.request.adapter_slot is None else item.request.adapter_slot)
        left = self.max_num_batched_tokens - sum(item.num_new_tokens for item in scheduled)
        return StepPlan(tuple(self.drafter.add(scheduled, left)))

    def _shares(self, request: Request, budget: int) -> list[tuple[Request, int]]:
        """The sequences of a running request to be computed now, each with the number of its tokens.

        Those of a preempted search begin one after the other: each finds the blocks that it shares with others.
        """
        if request.search is None:
            missing = request.num_tokens - request.num_computed_tokens
            return [(request, min(missing, budget))] if missing else []  # none: its last token is being drawn
        shares: list[tuple[Request, int]] = []
        for sequence in request.sequences:
            if not sequence.block_ids:
                if shares:
                    break
                self.blocks.start(sequence)
            num_new = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if num_new:
                shares.append((sequence, num_new))
                budget -= num_new
        return shares

    def _grow(self, shares: Sequence[tuple[Request, int]]) -> bool:
        """Make room for what is to be computed. False: blocks are too few."""
        for sequence, num_new in shares:  # noqa: SIM110 - a generator takes a microsecond, for each request in each step
            if not self.blocks.grow(sequence, sequence.num_computed_tokens + num_new):
                return False
        return True

    def _admit(self, scheduled: list[ScheduledRequest], budget: int) -> None:
        """Start waiting requests while budget, places and blocks last."""
        places = self.max_num_seqs - sum(request.num_places for request in self.running)
        while budget > 0 and places > 0:
            request = self.waiting.peek()
            if request is None:
                break
            if not self._provide(request):
                continue
            first = request.sequences[0]
            self.blocks.start(first)
            num_new = min(first.num_tokens - first.num_computed_tokens, budget)
            if request.num_places > places or not self.blocks.grow(first, first.num_computed_tokens + num_new):
                self._release(request)
                break  # in order: no request overtakes one that waits for blocks
            places -= request.num_places
            self.waiting.remove(request)
            request.state = RequestState.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self.clock()
                request.num_cached_tokens = request.num_computed_tokens
                self.waiting.charge(request, prompt_tokens=request.num_tokens - request.num_computed_tokens)
            self._insert_running(request)
            scheduled.append(self._scheduled(first, num_new))
            budget -= num_new

    def _scheduled(self, request: Request, num_new: int) -> ScheduledRequest:
        self.blocks.publish(request, request.num_computed_tokens + num_new)
        if request.copied_block is None:
            return ScheduledRequest(request, request.num_computed_tokens, num_new)
        copied = request.copied_block, request.block_ids[request.num_computed_tokens // self.blocks.block_size]
        request.copied_block = None
        return ScheduledRequest(request, request.num_computed_tokens, num_new, copied_block=copied)

    def _insert_running(self, request: Request) -> None:
        index = len(self.running)
        while index > 0 and self.running[index - 1].order > request.order:
            index -= 1
        self.running.insert(index, request)

    def _claim(self, request: Request) -> tuple[int, float, int]:
        """The order in which requests lose their blocks when these are short: the largest value first."""
        priority, arrival_number = request.order
        return priority, self.waiting.served(request.tenant), arrival_number

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks. It keeps its adapter and recomputes, mostly from the prefix cache."""
        self._release(request)
        request.pooled.clear()
        request.state = RequestState.WAITING
        self.waiting.push(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        request.num_given = min(request.num_given, self._num_lasting)
        for sequence in request.sequences:
            self.blocks.release(sequence)
        if request.search is not None:
            request.search.forget()

    # ---- resources -------------------------------------------------------------------------------------------------

    def _provide(self, request: Request) -> bool:
        """Make sure that the request at the head holds what it needs, else set it aside so that others go on."""
        while request.num_given < len(self.rooms):
            try:
                given = self.rooms[request.num_given].provide(request)
            except NeverReadyError as problem:
                self.fail(request, str(problem), problem.reason)
                return False
            if not given:
                self.waiting.remove(request)
                request.state = RequestState.WAITING_FOR_RESOURCE
                return False
            request.num_given += 1
        return True

    def _end_waits(self) -> None:
        """Bring back the requests that have got what they waited for; fail those that never will."""
        for room in self.rooms:
            for request, problem in room.waited():
                if problem is not None:
                    self.fail(request, str(problem), problem.reason)
                    continue
                room.leave(request)
                request.num_given += 1
                request.state = RequestState.WAITING
                self.waiting.push(request)

    # ---- results ---------------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in what a step computed: append tokens, finish requests, and say what each one got."""
        outputs, self._outputs = self._outputs, []
        self.drafter.learn(plan, result)
        prompt_logprobs, pooled = result.prompt_logprobs, result.pooled
        for item, sampled in zip(plan.scheduled, result.sampled, strict=True):
            request, state = item.request, item.request.leader.state
            if state is RequestState.RUNNING:
                request.num_computed_tokens = item.num_computed_tokens + item.num_new_tokens
            elif state is RequestState.FINISHED or request.request_id in result.not_finite:
                continue  # it ended before this was read, or it was preempted and will fail when it is computed again
            num_prompt_left = request.num_prompt_tokens - item.num_computed_tokens
            if num_prompt_left > 0:
                self.prompt_tokens += min(item.num_new_tokens, num_prompt_left)
            if request.request_id in prompt_logprobs:
                request.take_prompt_logprobs(item.num_computed_tokens + 1, prompt_logprobs[request.request_id])
            if request.request_id in pooled:
                request.take_pooled(pooled[request.request_id])
            if request.search is not None:
                if sampled:
                    outputs += self._take_candidates(request, request.search, sampled[0])
            elif sampled:
                outputs.append(self._take_tokens(item, sampled))
            elif item.catches_up and not request.draws:
                outputs.append(self._end_without_tokens(request))
        return outputs

    def _end_without_tokens(self, request: Request) -> RequestOutput:
        """End a request that wanted no more than its prompt computed."""
        self._finish(request, FinishReason.MAX_TOKENS)
        output = RequestOutput(request.request_id, [], FinishReason.MAX_TOKENS, pooled=bytes(request.pooled))
        return request.with_beginning(output)

    def _take_tokens(self, item: ScheduledRequest, sampled: Sequence[SampledToken]) -> RequestOutput:
        """Append the tokens, up to the one that ends the request."""
        request = item.request
        first = request.num_output_tokens == 0
        token_ids = [token.token_id for token in sampled]
        count, reason, stop_token_id = request.take_tokens(token_ids, self.max_model_len)
        output = RequestOutput(
            request_id=request.request_id,
            token_ids=token_ids[:count],
            finish_reason=reason,
            stop_token_id=stop_token_id,
            logprobs=[token.logprobs for token in sampled[:count] if token.logprobs is not None] or None,
            num_drafts=len(item.draft_token_ids),
            num_accepted_drafts=self._keep_drafts(item, count - 1) if item.draft_token_ids else 0,
        )
        self.generated_tokens += count
        self.waiting.charge(request, output_tokens=count)
        if reason is not None:
            self._finish(request, reason)
        return request.with_beginning(output) if first else output

    def _take_candidates(
        self, sequence: Request, search: BeamSearch[Request], token: SampledToken
    ) -> list[RequestOutput]:
        """Note what may follow a sequence of a search, which goes on once that is known of all."""
        if not search.take(sequence, token.candidates):
            return []
        leader, count = search.leader, len(search.sequences)
        first = search.length == 0
        self.generated_tokens += count
        self.waiting.charge(leader, output_tokens=count)
        taken = RequestOutput(leader.request_id, [], num_searched=count)
        continuations = search.advance()
        if continuations:
            search.branch(continuations, self.blocks)
        elif not search.ended:
            return [self._failed(leader, f"its form cannot go on: {NOTHING_FITS}", UNUSABLE_FORM)]
        outputs = [leader.with_beginning(taken) if first else taken]
        return outputs if continuations else outputs + self._end_search(search)

    def _end_search(self, search: BeamSearch[Request], reason: FinishReason | None = None) -> list[RequestOutput]:
        """Say what a search has found. `reason`: why it goes no further, where it has not ended by itself."""
        leader, found = search.leader, search.outputs(reason)
        self._finish(leader, found[0].finish_reason or FinishReason.MAX_TOKENS)
        return [leader.with_beginning(output) for output in found]

    def _keep_drafts(self, item: ScheduledRequest, num_before_last: int) -> int:
        """Count as computed the drafts that were drawn, and let others find their blocks. Returns their number."""
        num_accepted = min(len(item.draft_token_ids), num_before_last)
        self.draft_tokens += len(item.draft_token_ids)
        self.accepted_draft_tokens += num_accepted
        self.blocks.publish(item.request, item.request.num_computed_tokens + num_accepted)
        item.request.num_computed_tokens += num_accepted
        return num_accepted

    def _expire(self) -> None:
        """Finish the requests whose own time limit has passed, in any state, with the tokens that they have."""
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.search is not None:
                self._outputs += self._end_search(request.search, FinishReason.TIME_LIMIT)
            elif request is not None:
                request.forget_unread()
                self._finish(request, FinishReason.TIME_LIMIT)
                output = RequestOutput(request_id, [], FinishReason.TIME_LIMIT)
                self._outputs.append(output if request.num_output_tokens else request.with_beginning(output))

    def fail(self, request: Request, error: str, reason: str = "") -> None:
        """End one request with an error, which the next `update` reports. `reason`: its kind, if it has a name."""
        self._outputs.append(self._failed(request, error, reason))

    def _failed(self, request: Request, error: str, reason: str) -> RequestOutput:
        self._finish(request, FinishReason.ERROR)
        self.num_forms_failed += reason == UNUSABLE_FORM
        return RequestOutput(request.request_id, [], FinishReason.ERROR, error=error, error_reason=reason)

    def fail_step(self, plan: StepPlan, error: str) -> None:
        """End every request of a step that could not be computed. The others have lost nothing."""
        for item in plan.scheduled:
            self.blocks.retract(item.request, item.num_computed_tokens)
        for request in _leaders(item.request for item in plan.scheduled):
            if request.state is RequestState.RUNNING:  # else the step before has ended it
                self.fail(request, error)

    def fail_formless(self, requests: Sequence[Request], problems: Mapping[int, str]) -> None:
        """End the requests that have a problem, by id: their forms allow no token."""
        for request in _leaders(requests):
            if request.request_id in problems:
                self.fail(request, problems[request.request_id], UNUSABLE_FORM)

    def fail_not_finite(self, requests: Sequence[Request], error: str) -> None:
        """End the requests whose logits were NaN or infinite. No other request uses their cached blocks."""
        for request in requests:
            self.blocks.distrust(request)
        failed = _leaders(requests)
        for request in failed:
            self.fail(request, error)
        self.num_not_finite += len(failed)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        match request.state:
            case RequestState.RUNNING:
                self.running.remove(request)
            case RequestState.WAITING:
                self.waiting.remove(request)
            case RequestState.WAITING_FOR_RESOURCE:
                self.rooms[request.num_given].leave(request)
        self._release(request)
        self.drafter.forget(request)
        for room in self.rooms[: request.num_given]:
            room.release(request)
        if request.adapter is not None:
            for member in request.adapter.members:
                self.adapter_users[member] -= 1
                if self.adapter_users[member] == 0:
                    del self.adapter_users[member]
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]


def _leaders(requests: Iterable[Request]) -> list[Request]:
    """The requests that these are, or are sequences of, each once."""
    return list(dict.fromkeys(request.leader for request in requests))
