"""Adds drafts to the scheduler's plans: to requests that decode, as many as pay. They change how many steps an output
takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loraplex_engine.drafting.account import Account
from loraplex_engine.drafting.costs import StepCosts
from loraplex_engine.drafting.source import Source
from loraplex_engine.link.drafts import DraftKind
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.drafter import Drafter
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan, StepResult


class Drafting(Drafter):
    """Decides how many drafts each request gets, and asks their sources for them."""

    def __init__(
        self,
        blocks: BlockManager,
        sources: Mapping[DraftKind, Source],
        costs: StepCosts,
        most_drawn: int,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        """`most_drawn`: the tokens that one step may draw, drafts and all."""
        self._blocks = blocks
        self._sources = sources
        self._costs = costs
        self._most_drawn = most_drawn
        self._max_model_len = max_model_len
        self._clock = clock
        self._accounts: dict[int, Account] = {}  # by request id
        self._prices: dict[int, list[float]] = {}  # of 1, 2, … drafts in this step, by request id
        self._guesses: dict[int, Sequence[int]] = {}  # of the next token, where it is not computed; by request id
        self._began = 0.0  # when the step did, behind the drafts

    def add(self, scheduled: Sequence[ScheduledRequest], budget: int) -> list[ScheduledRequest]:
        budget = min(budget, self._most_drawn - sum(item.samples for item in scheduled))
        self._prices = {}
        decoding = [item.request for item in scheduled if _decodes(item)]
        wanted = self._wanted(decoding, budget)
        watched = self._watched(decoding, wanted)
        found: dict[int, Sequence[int]] = {}
        for kind, source in self._sources.items():
            of_kind = {each: asked for each, asked in (wanted | watched).items() if asked[0].drafts.kind is kind}
            if of_kind:
                found |= source.propose(of_kind)
        self._guesses = {request_id: found.pop(request_id, ()) for request_id in watched}
        added = [self._with(item, found.get(item.request.request_id, ())) for item in scheduled]
        self._began = self._clock()
        return added

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        if plan.scheduled and all(map(_decodes, plan.scheduled)):
            self._costs.note(plan.num_tokens, self._clock() - self._began)
        for item, sampled in zip(plan.scheduled, result.sampled, strict=True):
            request_id = item.request.request_id
            account = self._accounts.get(request_id)
            if account is None or not sampled:
                continue
            if item.draft_token_ids:
                tried, right = len(item.draft_token_ids), len(sampled) - 1
                account.settle(self._prices[request_id][tried - 1], tried, right)
            elif request_id in self._guesses:
                guess = self._guesses[request_id]
                account.watch(sampled[0].token_id == guess[0] if guess else None)

    def forget(self, request: Request) -> None:
        if self._accounts.pop(request.request_id, None):
            self._sources[request.drafts.kind].forget(request)

    def _wanted(self, requests: Sequence[Request], budget: int) -> dict[int, tuple[Request, int]]:
        """How many drafts each request may have, by request id."""
        wanted: dict[int, tuple[Request, int]] = {}
        rows = len(requests)
        for request in requests:
            account = self._accounts.setdefault(request.request_id, Account()) if request.drafts.most else None
            if account is None:
                continue
            account.draw()
            prices = self._prices_of(request, len(requests), rows, budget)
            count = account.affordable(prices)
            if count:
                wanted[request.request_id] = request, count
                self._prices[request.request_id] = prices
                rows, budget = rows + count, budget - count
        return wanted

    def _watched(
        self, requests: Sequence[Request], wanted: Mapping[int, tuple[Request, int]]
    ) -> dict[int, tuple[Request, int]]:
        """The requests without drafts whose next token is guessed all the same, where that costs nothing.

        Whether it was right says whether drafts would pay.
        """
        return {
            request.request_id: (request, 1)
            for request in requests
            if request.request_id not in wanted
            and (account := self._accounts.get(request.request_id)) is not None
            and self._sources[request.drafts.kind].is_free
            and account.may_watch()
        }

    def _prices_of(self, request: Request, num_requests: int, rows: int, budget: int) -> list[float]:
        """What 1, 2, … drafts of a request cost, in tokens: to make them, and to check them in a step of `rows`."""
        token_seconds = self._costs.seconds(num_requests) / num_requests
        making = self._sources[request.drafts.kind].costs(request, num_requests, token_seconds)
        most = min(request.drafts.most, budget, self._useful(request))
        return [
            price + (making.first + making.each * count) / token_seconds
            for count, price in enumerate(self._costs.prices(num_requests, rows, most), 1)
        ]

    def _useful(self, request: Request) -> int:
        """The drafts that can be drawn: the last token of an output follows them."""
        left = request.sampling.max_tokens - request.num_output_tokens
        return min(left, self._max_model_len - request.num_tokens) - 1

    def _with(self, item: ScheduledRequest, drafts: Sequence[int]) -> ScheduledRequest:
        """The item with those of the drafts that its form allows, as far as it holds blocks for them."""
        request = item.request
        if drafts and request.form is not None:
            drafts = drafts[: request.form.num_allowed(drafts)]
        if not drafts or not self._blocks.grow(request, request.num_tokens + len(drafts)):
            return item
        return item._replace(draft_token_ids=tuple(drafts))


def _decodes(item: ScheduledRequest) -> bool:
    return item.samples and item.num_new_tokens == 1
