"""The sampling parameters and stop conditions of a request. Torch-free: the service imports them."""

import sys
from enum import IntEnum
from functools import cached_property

import msgspec

from loraplex_engine.link.watermark import Watermark

# Divided by less than this, logits that differ at all differ so much that only the best token could be drawn.
GREEDY_BELOW = 1e-5


class FinishReason(IntEnum):
    """Why an output ended. The values travel between processes: never renumber."""

    STOP = 1  # a stop string or a stop token id of the request
    EOS = 2  # an end-of-sequence token of the model
    MAX_TOKENS = 3
    CONTEXT_LIMIT = 4  # the model's context is full
    TIME_LIMIT = 5  # the request's own soft limit: a partial answer, but an answer
    CANCELLED = 6
    ERROR = 7


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """How to choose the next token, and when to stop. The service has checked the ranges.

    The order in which they act: penalties and logit_bias, the watermark, then masks (allowed_token_ids, min_tokens,
    bad_words and the form), then greedy if temperature is 0, else temperature, top_k, top_p, min_p, typical_p, and one
    draw from (seed, position).
    """

    temperature: float = 1.0  # 0, and what is next to it, is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output (as in transformers)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int  # always set; the service draws one where the user gives none, and reports it
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()  # that the output's text must not have; none is empty
    num_token_ids: int | None = None  # ids from here on have no token in the tokenizer: never drawn; None: all have one
    max_tokens: int  # 0: none is drawn, and the output ends once the prompt is computed
    min_tokens: int = 0  # until then neither EOS nor stop ids can be sampled
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end outputs of a search; in those of others the service finds them
    eos_token_ids: tuple[int, ...] = ()  # the model's; empty when the request ignores EOS
    num_logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    num_prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0  # the first token to be told of; those before it may come from the cache
    logprob_token_ids: tuple[int, ...] = ()  # whose log-probabilities to tell beside those
    processed_logprobs: bool = False  # of the distribution that a token is drawn from, instead of the model's own
    watermark: Watermark | None = None
    num_candidates: int = 0  # of a search: the best tokens to be told of, instead of one that is drawn
    time_limit_seconds: float | None = None

    @property
    def can_draw(self) -> bool:
        """Whether any token may be drawn before `min_tokens`, when tokens that end the output are forbidden."""
        endings = {*self.eos_token_ids, *self.stop_token_ids} if self.min_tokens else set()
        limit = self.num_token_ids or sys.maxsize
        allowed = range(limit) if self.allowed_token_ids is None else self.allowed_token_ids
        return any(token < limit and token not in endings for token in allowed)

    @cached_property  # this and the next ones: each step asks for them, for each of its rows
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @cached_property
    def tells_more(self) -> bool:
        """Whether anything is told of a row besides its token."""
        return self.num_logprobs is not None or self.num_candidates > 0

    @cached_property
    def changes_logits(self) -> bool:
        """Whether parameters change a row's logits, `min_tokens` aside, which does so for a while."""
        other = bool(self.logit_bias) or self.allowed_token_ids is not None or self.watermark is not None
        return other or self.needs_penalties

    @cached_property
    def needs_history(self) -> bool:
        """Whether a row's token depends on the tokens before it, besides by its logits."""
        return self.needs_penalties or self.watermark is not None

    @cached_property
    def needs_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
