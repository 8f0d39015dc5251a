"""The data of a step: the plan that the scheduler makes, and the result that the runner returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from loraplex_engine.link.messages import TokenLogprobs
from loraplex_engine.scheduling.beam_search import Candidate
from loraplex_engine.scheduling.request import Request

# How long to listen before the next step when the last one did nothing, because another thread reads what it needs.
STALLED_SECONDS: Final = 0.002


class ScheduledRequest(NamedTuple):  # like SampledToken: made for each row, in a quarter of a dataclass's time
    """One request's share of a step: compute `num_new_tokens` tokens from `num_computed_tokens` on.

    Drafts are computed after the last known token. What is drawn at each place does not depend on them: they save the
    steps of those that are guessed right, up to the first that is not. The request must hold blocks for them.
    """

    request: Request  # read-only for the runner
    num_computed_tokens: int  # at the start of the step
    num_new_tokens: int  # 1 when decoding, a chunk of the prompt when prefilling
    draft_token_ids: tuple[int, ...] = ()  # guesses at the tokens to be drawn; only where the step draws
    copied_block: tuple[int, int] | None = None  # a block, and the one that gets its content before the step

    @property
    def num_rows(self) -> int:
        """The rows that it takes in the step."""
        return self.num_new_tokens + len(self.draft_token_ids)

    @property
    def catches_up(self) -> bool:
        """Whether the step reaches the last known token."""
        return self.num_computed_tokens + self.num_new_tokens == len(self.request.token_ids)

    @property
    def samples(self) -> bool:
        """Whether the step draws the next token."""
        return self.catches_up and self.request.draws


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The requests of a step. Base requests come first, then those of each adapter slot together: an adapter's rows are
    one range of the batch, whatever mixture of prefill and decode they are."""

    scheduled: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_rows for item in self.scheduled)

    @property
    def is_foreseeable(self) -> bool:
        """Whether the next step can be planned before the tokens of this one are read."""
        return bool(self.scheduled) and all(item.request.is_foreseeable for item in self.scheduled)

    def foresee(self, max_model_len: int) -> None:
        """Have the requests be as if the step had been computed: its tokens are known to the device alone."""
        for item in self.scheduled:
            request, samples = item.request, item.samples
            request.num_computed_tokens = item.num_computed_tokens + item.num_new_tokens
            if samples:
                request.expect_token(max_model_len)

    def recall(self) -> None:
        """Have the requests have the tokens again that they had when the step was planned: it is read now."""
        for item in self.scheduled:
            item.request.forget_unread()


class SampledToken(NamedTuple):
    """The token drawn for one request, with its log-probabilities if they were asked for."""

    token_id: int  # for a sequence of a search without a meaning
    logprobs: TokenLogprobs | None
    candidates: tuple[Candidate, ...] = ()  # for a sequence of a search: what may follow it, the best first


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step, aligned with the plan."""

    sampled: tuple[tuple[SampledToken, ...], ...]  # by scheduled request, the tokens that follow; empty: none was drawn
    prompt_logprobs: dict[int, list[TokenLogprobs]]  # by request id: of the prompt tokens that this step's rows predict
    not_finite: frozenset[int] = frozenset()  # the ids of requests whose logits were NaN or infinite
    pooled: Mapping[int, bytes] = field(default_factory=dict)  # by request id: its rows, or their sum so far
    problems: Mapping[int, str] = field(default_factory=dict)  # by request id: why its form allows no token


@dataclass(frozen=True, slots=True)
class PendingResult:
    """The result of a step that was started, and that a device may still be computing."""

    result: Callable[[], StepResult]  # waits for it, and raises what went wrong in the step; called once
