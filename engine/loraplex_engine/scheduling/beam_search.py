"""Beam search: which continuations of a request's sequences go on, and which of those that ended are the best.

It decides as transformers' `generate(num_beams=…)` does. The sequences run like any others; the search goes on when
all of them have been computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Generic, Protocol, Self, TypeVar

from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.messages import RequestOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An output that has ended."""

    score: float  # the sum of its tokens' log-probabilities, divided by its length to the power of the penalty
    token_ids: list[int]
    reason: FinishReason
    stop_token_id: int | None = None


class Beam(Protocol):
    """A sequence of a search: a request, or one that has branched off it."""

    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    sampling: SamplingParams

    @property
    def num_output_tokens(self) -> int: ...

    def forked(self) -> Self: ...


B = TypeVar("B", bound=Beam)
B_contra = TypeVar("B_contra", bound=Beam, contravariant=True)


class Blocks(Protocol[B_contra]):
    """The cache that sequences have blocks of."""

    def release(self, request: B_contra) -> None: ...

    def fork(self, parent: B_contra, child: B_contra) -> None: ...


@dataclass(frozen=True, slots=True)
class Continuation(Generic[B]):
    """A sequence, and a token that may follow it."""

    total: float  # of the log-probabilities of all of its tokens
    sequence: B
    token_id: int


class BeamSearch(Generic[B]):
    """The sequences of one request that are searched, and the best that have ended."""

    def __init__(self, beams: Beams, request: B) -> None:
        self.beams = beams
        self.leader = request  # the request itself, which stands for all sequences
        self.sequences = [request]  # the best first
        self.ended: list[Hypothesis] = []  # the best first, at most as many as beams
        self._totals = {request: 0.0}
        self._found: dict[B, TokenLogprobs] = {}

    def take(self, sequence: B, found: TokenLogprobs) -> bool:
        """Note what may follow a sequence. Returns whether that is known of all of them."""
        self._found[sequence] = found
        return len(self._found) == len(self.sequences)

    def forget(self) -> None:
        """Drop what may follow: the sequences are computed again."""
        self._found.clear()

    def advance(self) -> list[Continuation[B]]:
        """What goes on, the best first, once it is known what may follow; none: the search has ended."""
        sampling, length = self.leader.sampling, self.length + 1
        candidates = self._candidates()
        self._found.clear()
        at_end = length >= sampling.max_tokens
        going_on: list[Continuation[B]] = []
        for place, candidate in enumerate(candidates):
            reason = self._reason(candidate.token_id, at_end)
            if reason is None:
                going_on.append(candidate)
            elif place < self.beams.width:
                self._end(candidate, length, reason)
        self.ended = sorted(self.ended, key=lambda each: -each.score)[: self.beams.width]
        going_on = going_on[: self.beams.width]
        return going_on if going_on and self._may_improve(going_on[0].total, length) else []

    def branch(self, continuations: Sequence[Continuation[B]], blocks: Blocks[B]) -> None:
        """Let sequences go on as their continuations. Those with several branch, and those with none end."""
        parents = {each.sequence for each in continuations}
        for sequence in self.sequences:
            if sequence not in parents:
                blocks.release(sequence)
        heirs: list[B] = []
        for parent in (each.sequence for each in continuations):
            heir = parent.forked() if parent in heirs else parent
            if heir is not parent:
                blocks.fork(parent, heir)
            heirs.append(heir)
        for heir, continuation in zip(heirs, continuations, strict=True):
            heir.token_ids.append(continuation.token_id)
        self.sequences = heirs
        self._totals = {heir: each.total for heir, each in zip(heirs, continuations, strict=True)}

    def outputs(self, reason: FinishReason | None) -> list[RequestOutput]:
        """The best outputs, as many as are wanted. With a reason the sequences that have not ended do so for it."""
        if reason is not None and self.length:
            for sequence in self.sequences:
                self._keep(self._totals[sequence], _output(sequence), reason, None)
        ids = self.beams.output_ids
        best = sorted(self.ended, key=lambda each: -each.score)[: len(ids)]
        nothing = Hypothesis(-math.inf, [], reason or FinishReason.MAX_TOKENS)
        return [
            RequestOutput(output_id, each.token_ids, each.reason, each.stop_token_id, score=each.score)
            for output_id, each in zip(ids, chain(best, repeat(nothing)), strict=False)
        ]

    @property
    def length(self) -> int:
        """The tokens that each sequence has behind the prompt."""
        return self.sequences[0].num_output_tokens

    def _candidates(self) -> list[Continuation[B]]:
        """The best continuations of all sequences, the best first."""
        sampling = self.leader.sampling
        every = [
            Continuation(self._totals[sequence] + logprob, sequence, token_id)
            for sequence in self.sequences
            for token_id, logprob in zip(self._found[sequence].top_ids, self._found[sequence].top_logprobs, strict=True)
        ]
        every.sort(key=lambda each: -each.total)
        return every[: sampling.num_candidates]

    def _reason(self, token_id: int, at_end: bool) -> FinishReason | None:
        sampling = self.leader.sampling
        if token_id in sampling.eos_token_ids:
            return FinishReason.EOS
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.MAX_TOKENS if at_end else None

    def _end(self, candidate: Continuation[B], length: int, reason: FinishReason) -> None:
        stop_token_id = None if reason is FinishReason.MAX_TOKENS else candidate.token_id
        self._keep(candidate.total, [*_output(candidate.sequence), candidate.token_id], reason, stop_token_id)

    def _keep(self, total: float, token_ids: list[int], reason: FinishReason, stop_token_id: int | None) -> None:
        score = total / len(token_ids) ** self.beams.length_penalty
        self.ended.append(Hypothesis(score, token_ids, reason, stop_token_id))

    def _may_improve(self, best_total: float, length: int) -> bool:
        """Whether a sequence that goes on may end better than the worst that is kept."""
        beams = self.beams
        if len(self.ended) < beams.width:
            return True
        if beams.early_stopping is EarlyStopping.ALWAYS:
            return False
        is_patient = beams.early_stopping is EarlyStopping.NEVER and beams.length_penalty > 0
        final = self.leader.sampling.max_tokens if is_patient else length
        return bool(best_total / final**beams.length_penalty > self.ended[-1].score)


def _output(sequence: Beam) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]
