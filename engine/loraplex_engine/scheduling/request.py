"""One sequence on its way through the engine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from enum import Enum, auto
from typing import Final, NamedTuple

import msgspec

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest, Embedded, Parts, RequestOutput, TokenLogprobs
from loraplex_engine.link.pooling import PoolingMethod
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.beam_search import BeamSearch
from loraplex_engine.scheduling.form import Form, FormKey
from loraplex_engine.scheduling.token_counts import Counted, TokenCounts

ENDED_BY_TOKEN = (FinishReason.STOP, FinishReason.EOS)
NO_TOKEN: Final = -1  # at each position of an embedded part: no vocabulary has it
UNREAD: Final = -2  # in place of a token that only the device knows yet


class Taken(NamedTuple):
    """How many of the tokens that were drawn a request took, and why it ended with the last of these."""

    num_tokens: int
    reason: FinishReason | None = None  # None: it goes on
    stop_token_id: int | None = None


class RequestState(Enum):
    """The state of a request. Only the scheduler changes it."""

    WAITING = auto()  # for a turn, or for blocks; also after a preemption
    WAITING_FOR_RESOURCE = auto()  # that somebody prepares for it
    RUNNING = auto()  # holds blocks, gets tokens computed
    FINISHED = auto()


class Request:
    """One sequence: its tokens, how many of them are computed, and the blocks and adapter that it holds.

    There is no prefill or decode state: a request always catches up `num_computed_tokens` with `len(token_ids)`, many
    at a time or one.
    """

    __slots__ = (
        "adapter",
        "adapter_slot",
        "adapter_start",
        "adapter_wait_seconds",
        "arrival_time",
        "block_hashes",
        "block_ids",
        "bypass_prefix_cache",
        "cache_salt",
        "copied_block",
        "deadline",
        "drafts",
        "draws",
        "embedded",
        "finish_reason",
        "first_scheduled_time",
        "form",
        "form_key",
        "leaves_cache",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_given",
        "num_prompt_tokens",
        "order",
        "pooled",
        "pooling",
        "prompt_logprobs",
        "request_id",
        "sampling",
        "search",
        "state",
        "tenant",
        "token_counts",
        "token_ids",
        "waits",
        "weight",
    )

    def __init__(self, message: AddRequest, arrival_number: int, now: float) -> None:
        sampling = message.sampling
        self.request_id = message.request_id
        self.sampling: SamplingParams = sampling
        self.draws = sampling.max_tokens > 0  # whether tokens are drawn; else it ends once its prompt is computed
        self.adapter: AdapterKey | None = message.adapter
        self.cache_salt = message.cache_salt
        self.bypass_prefix_cache = message.bypass_prefix_cache
        self.pooling = message.pooling
        self.pooled = bytearray()  # of the rows computed so far, as StepResult has it
        has_form = message.grammar or sampling.bad_words or sampling.stop
        key = FormKey(message.grammar, sampling.bad_words, sampling.stop, tuple(message.output_token_ids))
        self.form_key = key if has_form else None  # what its form is prepared for
        self.form: Form | None = None  # that its output must have
        self.drafts = message.drafts
        self.adapter_wait_seconds = message.adapter_wait_seconds
        self.tenant = message.tenant
        self.weight = message.weight
        self.order = (message.priority, arrival_number)  # the order of arrival
        self.arrival_time = now
        self.deadline = None if sampling.time_limit_seconds is None else now + sampling.time_limit_seconds

        self.token_ids: list[int] = []  # prompt, then output
        self.embedded: list[tuple[int, Embedded]] = []  # the parts of the prompt that have no tokens: first position
        self._lay_out(message.prompt)
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids += message.output_token_ids
        self.token_counts: TokenCounts | None = None  # once somebody asks
        self.num_computed_tokens = 0  # tokens whose keys and values are in the cache
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_given = 0  # preparers that have given it what it needs, in the scheduler's order
        self.waits: dict[Hashable, float] = {}  # seconds that it waited for each thing that was not ready

        self.search: BeamSearch[Request] | None = None
        if message.beams is not None:
            self.search = BeamSearch(message.beams, self)
        self.block_ids: list[int] = []
        self.copied_block: int | None = None  # to be copied into its last block before its next step
        self.block_hashes: list[bytes] = []  # of the full blocks of token_ids, as far as they were asked for
        self.adapter_slot: int | None = None
        self.adapter_start: int | None = 0  # the first token that the adapter applies to; None: it was not invoked
        self.leaves_cache = False  # whether all keys and values are the base model's with its adapter, too
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at first scheduling
        self.first_scheduled_time: float | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = []

    def invoke_adapter(self, tokens: Sequence[int]) -> None:
        """Apply the adapter from the last occurrence of these tokens in the prompt on; empty: from the start.

        Generated tokens do not invoke it. Source: Activated LoRA (arXiv 2504.12397), as PEFT applies it.
        """
        if not tokens:
            return
        prompt, wanted = self.token_ids[: self.num_prompt_tokens], list(tokens)
        starts = range(len(prompt) - len(wanted), -1, -1)
        self.adapter_start = next((at for at in starts if prompt[at : at + len(wanted)] == wanted), None)

    def _lay_out(self, prompt: list[int] | Parts) -> None:
        """Give each part of the prompt its positions."""
        for part in prompt.parts if isinstance(prompt, Parts) else [prompt]:
            if isinstance(part, Embedded):
                self.embedded.append((len(self.token_ids), part))
                self.token_ids += [NO_TOKEN] * part.length
            else:
                self.token_ids += part

    def forked(self) -> Request:
        """A sequence with the same tokens, which holds no blocks."""
        fork = copy(self)
        fork.token_ids, fork.block_hashes = list(self.token_ids), list(self.block_hashes)
        fork.block_ids, fork.num_computed_tokens, fork.token_counts = [], 0, None
        return fork

    def counts(self, drafts: Sequence[int]) -> list[Counted]:
        """How often it has its tokens, and how often it would have them behind each of these drafts."""
        if self.token_counts is None:
            self.token_counts = TokenCounts(self.token_ids[: self.num_prompt_tokens])
        self.token_counts.follow(self.token_ids[self.num_prompt_tokens :])
        return self.token_counts.behind_each(drafts)

    @property
    def sequences(self) -> Sequence[Request]:
        """What is computed for it: itself, or the sequences of its search."""
        return (self,) if self.search is None else self.search.sequences

    @property
    def leader(self) -> Request:
        """The request that the scheduler knows: itself, unless it is a sequence of a search."""
        return self if self.search is None else self.search.leader

    @property
    def num_places(self) -> int:
        """How many sequences it may have."""
        return 1 if self.search is None else self.search.beams.width

    @property
    def is_foreseeable(self) -> bool:
        """Whether what its next step needs of the token before is its place alone, besides the token on the device."""
        sampling = self.sampling
        return not (sampling.needs_history or self.form_key or self.search or self.pooling or self.drafts.most)

    def expect_token(self, max_model_len: int) -> None:
        """Have a place for the token that is being drawn, if another may follow it."""
        if self.num_output_tokens + 1 < self.sampling.max_tokens and self.num_tokens + 1 < max_model_len:
            self.token_ids.append(UNREAD)

    def forget_unread(self) -> None:
        """Be as before `expect_token`."""
        if self.token_ids[-1] == UNREAD:
            self.token_ids.pop()

    @property
    def num_read_tokens(self) -> int:
        """The tokens that are known here; all, or all but the last."""
        return len(self.token_ids) - (self.token_ids[-1] == UNREAD)

    def take_pooled(self, part: bytes) -> None:
        """Take what a step made of its rows: in place of what was before, or behind it where each row counts."""
        if self.pooling is None or self.pooling.method is not PoolingMethod.EACH:
            self.pooled.clear()
        self.pooled += part

    def take_tokens(self, token_ids: Sequence[int], max_model_len: int) -> Taken:
        """Append the tokens, up to the one that ends the request."""
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            reason = self._end(token_id, max_model_len)
            if reason in ENDED_BY_TOKEN:
                return Taken(count, reason, token_id)
            if self.form is not None and self.form.take(token_id):
                return Taken(count, FinishReason.STOP)
            if reason is not None:
                return Taken(count, reason)
        return Taken(len(token_ids))

    def take_prompt_logprobs(self, first: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Take what a step says of the prompt's tokens, from the position `first` on."""
        start = self.sampling.prompt_logprobs_from
        if not self.prompt_logprobs and start == 0:
            self.prompt_logprobs.append(None)  # nothing predicts the first token
        already_known = start + len(self.prompt_logprobs) - max(first, start)  # after a preemption
        self.prompt_logprobs.extend(logprobs[max(0, already_known) :])

    def with_beginning(self, output: RequestOutput) -> RequestOutput:
        """Add the facts that only the first output carries."""
        began = self.first_scheduled_time
        return msgspec.structs.replace(
            output,
            prompt_logprobs=self.prompt_logprobs or None,
            num_cached_tokens=self.num_cached_tokens,
            queue_seconds=None if began is None else began - self.arrival_time,
            adapter_load_seconds=self.waits.get(self.adapter, 0.0),
        )

    def _end(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Why the request ends with this token, which is its last now; None: it goes on."""
        sampling, num_tokens = self.sampling, len(self.token_ids)
        num_output_tokens = num_tokens - self.num_prompt_tokens
        if num_output_tokens >= sampling.min_tokens:
            if token_id in sampling.eos_token_ids:
                return FinishReason.EOS
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        if num_output_tokens >= sampling.max_tokens:
            return FinishReason.MAX_TOKENS
        if num_tokens >= max_model_len:
            return FinishReason.CONTEXT_LIMIT
        return None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_reusable_tokens(self) -> int:
        """The most tokens to take from the cache. The row of a token that another is predicted from must be computed:
        the last, which the next one is drawn from, and those before the prompt's tokens that are to be told of; so must
        the rows that are pooled.
        """
        if self.pooling is not None and self.pooling.reads_all_tokens:
            return 0
        if self.sampling.num_prompt_logprobs is None:
            return self.num_tokens - 1
        return min(self.num_tokens, max(self.sampling.prompt_logprobs_from, 1)) - 1

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.state.name}, computed {self.num_computed_tokens} of {self.num_tokens}, "
            f"{len(self.block_ids)} blocks)"
        )
