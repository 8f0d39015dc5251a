"""Beam search: which continuations of a request's sequences go on, and which of those that ended are the best.

It decides as transformers' `generate(num_beams=…)` does. The sequences run like any others; the search goes on when
all of them have been computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.messages import RequestOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.form import Form


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that may follow a sequence."""

    token_id: int
    logprob: float  # that the search adds up
    told: TokenLogprobs | None = None  # what its output says of it; None: nothing was asked


class Ending(NamedTuple):
    """Why an output has ended."""

    reason: FinishReason
    stop_token_id: int | None = None  # the token that ended it, for EOS and STOP


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An output that has ended."""

    score: float  # the sum of its tokens' log-probabilities, divided by its length to the power of the penalty
    token_ids: list[int]
    told: list[TokenLogprobs]  # of its tokens; empty: nothing was asked
    ending: Ending


class Beam(Protocol):
    """A sequence of a search: a request, or one that has branched off it."""

    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    sampling: SamplingParams
    form: Form | None

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
class Standing:
    """How a sequence stands."""

    total: float  # of the log-probabilities of all of its tokens
    told: list[TokenLogprobs]  # of its tokens; empty: nothing was asked

    def behind(self, token: Candidate) -> Standing:
        """How it stands with one token more."""
        return Standing(self.total + token.logprob, self.told if token.told is None else [*self.told, token.told])


@dataclass(frozen=True, slots=True)
class Continuation(Generic[B]):
    """A sequence, and a token that may follow it."""

    sequence: B
    token_id: int
    standing: Standing  # with the token, as is the form
    form: Form | None


class BeamSearch(Generic[B]):
    """The sequences of one request that are searched, and the best that have ended."""

    def __init__(self, beams: Beams, request: B) -> None:
        self.beams = beams
        self.leader = request  # the request itself, which stands for all sequences
        self.sequences = [request]  # the best first
        self.ended: list[Hypothesis] = []  # the best first, at most as many as beams
        self._standings = {request: Standing(0.0, [])}
        self._found: dict[B, Sequence[Candidate]] = {}

    def take(self, sequence: B, found: Sequence[Candidate]) -> bool:
        """Note what may follow a sequence. Returns whether that is known of all of them."""
        self._found[sequence] = found
        return len(self._found) == len(self.sequences)

    def forget(self) -> None:
        """Drop what may follow: the sequences are computed again."""
        self._found.clear()

    def advance(self) -> list[Continuation[B]]:
        """What goes on, the best first, once it is known what may follow; none: the search has ended."""
        length = self.length + 1
        going_on: list[Continuation[B]] = []
        for place, (sequence, token) in enumerate(self._candidates()):
            if len(going_on) == self.beams.width:
                break
            standing = self._standings[sequence].behind(token)
            form = None if sequence.form is None else sequence.form.copy()
            ending = self._ending(token.token_id, form, length)
            if ending is None:
                going_on.append(Continuation(sequence, token.token_id, standing, form))
            elif place < self.beams.width:
                self._keep(standing, [*_output(sequence), token.token_id], ending)
        self._found.clear()
        self.ended = sorted(self.ended, key=lambda each: -each.score)[: self.beams.width]
        return going_on if going_on and self._may_improve(going_on[0].standing.total, length) else []

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
            heir.form = continuation.form
        self.sequences = heirs
        self._standings = {heir: each.standing for heir, each in zip(heirs, continuations, strict=True)}

    def outputs(self, reason: FinishReason | None) -> list[RequestOutput]:
        """The best outputs, as many as are wanted. With a reason the sequences that have not ended do so for it."""
        if reason is not None and self.length:
            for sequence in self.sequences:
                self._keep(self._standings[sequence], _output(sequence), Ending(reason))
        ids = self.beams.output_ids
        best = sorted(self.ended, key=lambda each: -each.score)[: len(ids)]
        nothing = Hypothesis(-math.inf, [], [], Ending(reason or FinishReason.MAX_TOKENS))
        return [
            RequestOutput(output_id, each.token_ids, *each.ending, each.told or None, each.score)
            for output_id, each in zip(ids, chain(best, repeat(nothing)), strict=False)
        ]

    @property
    def length(self) -> int:
        """The tokens that each sequence has behind the prompt."""
        return self.sequences[0].num_output_tokens

    def _candidates(self) -> list[tuple[B, Candidate]]:
        """The best continuations of all sequences, the best first."""
        totals = {sequence: standing.total for sequence, standing in self._standings.items()}
        every = [(sequence, token) for sequence in self.sequences for token in self._found[sequence]]
        every.sort(key=lambda each: -totals[each[0]] - each[1].logprob)
        return every[: self.leader.sampling.num_candidates]

    def _ending(self, token_id: int, form: Form | None, length: int) -> Ending | None:
        """Why an output of this length ends with this token, which its form takes; None: it goes on."""
        sampling = self.leader.sampling
        if token_id in sampling.eos_token_ids:
            return Ending(FinishReason.EOS, token_id)
        if token_id in sampling.stop_token_ids:
            return Ending(FinishReason.STOP, token_id)
        if form is not None and (form.take(token_id) or (form.completes_stop and length >= sampling.min_tokens)):
            return Ending(FinishReason.STOP)
        return Ending(FinishReason.MAX_TOKENS) if length >= sampling.max_tokens else None

    def _keep(self, standing: Standing, token_ids: list[int], ending: Ending) -> None:
        score = standing.total / len(token_ids) ** self.beams.length_penalty
        self.ended.append(Hypothesis(score, token_ids, standing.told, ending))

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
