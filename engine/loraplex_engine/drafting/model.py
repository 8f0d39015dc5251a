"""Drafts from a smaller model with the same tokenizer, which has a cache of its own and no adapters.

It draws with the parameters, the seed and the positions of the request, so that its draws fall as the large model's do
where both expect the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec

from loraplex_engine.drafting.costs import StepCosts
from loraplex_engine.drafting.source import NEVER, Costs, Source
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan

READING = 0.01  # of the time of the longest output: what reading a prompt may take, since its drafts may all be wrong


class ModelDrafts(Source):
    """Keeps a copy of each request for the small model, and lets that draw what may follow."""

    is_free = False

    def __init__(self, runner: ModelRunner, costs: StepCosts, max_num_batched_tokens: int) -> None:
        """`costs`: of the small model's steps."""
        self._runner = runner
        self._costs = costs
        self._budget = max_num_batched_tokens
        self._blocks = BlockManager(runner.num_blocks, runner.block_size, enable_prefix_caching=False)
        self._copies: dict[int, Request] = {}  # by request id
        self._known: dict[int, int] = {}  # how many tokens of each copy were not drafts

    def costs(self, request: Request, num_requests: int, token_seconds: float) -> Costs:
        each = self._costs.seconds(num_requests) / num_requests
        if request.num_tokens + request.drafts.most > self._runner.max_model_len:
            return NEVER
        if request.request_id in self._copies:
            behind = request.num_tokens - self._num_equal(request)
            return Costs(self._costs.seconds(behind) if behind > request.drafts.most + 1 else 0.0, each)
        left = request.sampling.max_tokens - request.num_output_tokens
        return Costs(0.0, each) if self._costs.seconds(request.num_tokens) <= READING * left * token_seconds else NEVER

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> dict[int, Sequence[int]]:
        goals: dict[int, int] = {}  # tokens of each copy, with its drafts
        for request_id, (request, count) in wanted.items():
            if self._follow(request, count):
                goals[request_id] = request.num_tokens + count
        while going := self._plan(goals):
            self._step(going)
            goals = {key: goal for key, goal in goals.items() if self._goes_on(key, goal)}
        return {key: copy.token_ids[self._known[key] :] for key, copy in self._copies.items() if key in wanted}

    def forget(self, request: Request) -> None:
        copy = self._copies.pop(request.request_id, None)
        if copy is not None:
            self._blocks.release(copy)
            del self._known[request.request_id]

    def _num_equal(self, request: Request) -> int:
        """The tokens that the request and its copy begin with alike."""
        theirs, place = self._copies[request.request_id].token_ids, self._known[request.request_id]
        end = min(len(theirs), request.num_tokens)
        while place < end and theirs[place] == request.token_ids[place]:
            place += 1
        return place

    def _follow(self, request: Request, count: int) -> bool:
        """Have the copy be as the request is, with room for drafts. False, and there is no copy: blocks are too few."""
        copy = self._copies.get(request.request_id)
        if copy is None:
            copy = self._copies[request.request_id] = _copied(request)
        else:
            equal = self._num_equal(request)
            copy.token_ids[equal:] = request.token_ids[equal:]
            copy.num_computed_tokens = min(copy.num_computed_tokens, equal)
        self._known[request.request_id] = request.num_tokens
        if self._blocks.grow(copy, request.num_tokens + count):
            return True
        self.forget(request)
        return False

    def _plan(self, goals: Mapping[int, int]) -> list[ScheduledRequest]:
        """As much of what the copies lack as one step may compute."""
        planned, left = [], self._budget
        for request_id in goals:
            copy = self._copies[request_id]
            count = min(copy.num_tokens - copy.num_computed_tokens, left)
            if count:
                planned.append(ScheduledRequest(copy, copy.num_computed_tokens, count))
                left -= count
        return planned

    def _step(self, planned: Sequence[ScheduledRequest]) -> None:
        began = time.monotonic()
        result = self._runner.execute(StepPlan(tuple(planned))).result()
        if all(item.num_new_tokens == 1 for item in planned):
            self._costs.note(len(planned), time.monotonic() - began)
        for item, sampled in zip(planned, result.sampled, strict=True):
            item.request.num_computed_tokens += item.num_new_tokens
            item.request.token_ids += [token.token_id for token in sampled]

    def _goes_on(self, request_id: int, goal: int) -> bool:
        """Whether the copy lacks drafts, and can have the next: a long prompt is read over several steps."""
        copy = self._copies[request_id]
        return self._known[request_id] < copy.num_tokens < goal


def _copied(request: Request) -> Request:
    count = request.num_prompt_tokens
    sampling = msgspec.structs.replace(request.sampling, num_logprobs=None, num_prompt_logprobs=None)
    prompt, output = request.token_ids[:count], request.token_ids[count:]
    message = AddRequest(request.request_id, prompt, sampling, output_token_ids=output)
    return Request(message, request.order[1], request.arrival_time)
