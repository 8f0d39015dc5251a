"""A step as plain data: the plan laid out as arrays, before anything is on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.request import UNREAD, Request
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan

Ranges = tuple[tuple[int, int, int], ...]  # (slot, first row, end row) of adapters, as in LoraSegments


PROMPT_LOGPROB_ROWS = 128  # rows of the vocabulary held at once: 128 x 128k floats are 64 MiB


class Counts(NamedTuple):
    """The tokens of a prompt and its output, each once, in any order."""

    token_ids: np.ndarray  # int64 [n]
    in_output: np.ndarray  # int64 [n]: how often the output has each


NO_COUNTS = Counts(np.array([], dtype=np.int64), np.array([], dtype=np.int64))


class History(NamedTuple):
    """What a row's token is drawn by besides its logits: the parameters, and the tokens before it."""

    request_id: int
    sampling: SamplingParams
    num_prompt_tokens: int
    num_tokens: int  # of prompt and output: the position of the token to be drawn
    counts: Counts = NO_COUNTS  # of these tokens; empty: no parameter asks for them
    green_seed: int = 0  # of its watermark, if it has one

    @classmethod
    def of(cls, request: Request, drafts: Sequence[int] = ()) -> History:
        """The history of all tokens that the request has, and of these drafts after them."""
        return cls.each(request, drafts)[-1]

    @classmethod
    def each(cls, request: Request, drafts: Sequence[int]) -> list[History]:
        """The history of the request, and that behind each of these drafts."""
        if not drafts and not request.sampling.needs_history:  # as nearly all are, in each step
            return [cls(request.request_id, request.sampling, request.num_prompt_tokens, len(request.token_ids))]
        counts = [NO_COUNTS] * (len(drafts) + 1)
        if request.sampling.needs_penalties:
            counts = [Counts(*(np.frombuffer(column, np.int64) for column in each)) for each in request.counts(drafts)]
        return [cls._behind(request, drafts[:number], each) for number, each in enumerate(counts)]

    @classmethod
    def _behind(cls, request: Request, drafts: Sequence[int], counts: Counts) -> History:
        sampling, token_ids = request.sampling, request.token_ids
        seed, mark = 0, sampling.watermark
        if mark is not None:
            seed = mark.seed([*token_ids[-mark.context_tokens :], *drafts][-mark.context_tokens :])
        return cls(request.request_id, sampling, request.num_prompt_tokens, len(token_ids) + len(drafts), counts, seed)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def may_not_end(self) -> bool:
        return self.num_output_tokens < self.sampling.min_tokens

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to the row's logits before its token is drawn, a form's mask aside."""
        return self.sampling.changes_logits or self.may_not_end


class Wanted(NamedTuple):
    """The tokens whose log-probabilities are told beside a token's own."""

    num_top: int  # the most likely ones
    named: tuple[int, ...]


def named_ids(wanted: Sequence[Wanted]) -> np.ndarray:
    """The tokens that rows name, filled up to the same number: int64 [S, N]"""
    width = max((len(each.named) for each in wanted), default=0)
    rows = [[*each.named, *[0] * (width - len(each.named))] for each in wanted]
    return np.array(rows, dtype=np.int64).reshape(len(wanted), width)


class PromptTargets(NamedTuple):
    """Tokens of one request's prompt, predicted by adjacent rows, whose log-probabilities are asked for."""

    request_id: int
    token_ids: list[int]
    beside: Wanted


class PooledRows(NamedTuple):
    """Adjacent rows of one request that its pooling counts."""

    request_id: int
    params: PoolingParams
    slot: int | None  # of its adapter
    num_rows: int
    num_tokens: int  # of the whole prompt
    is_last: bool  # whether the prompt's last token is among them
    sum_before: bytes  # float64 [C] of the rows of earlier steps, for MEAN; empty: there were none


@dataclass(frozen=True, slots=True)
class StepArrays:
    """All that a step's results depend on besides the model, its adapters and its cache.

    Refers to no live request, so that it can be kept, sent elsewhere, and computed again. The rows of one request are
    adjacent; base rows come before adapter rows. They are one sequence, or one and one for each draft behind it.
    """

    token_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    slot_mapping: np.ndarray  # int64 [T]; this and the next five as in AttentionMetadata
    query_starts: np.ndarray  # int32 [S+1]
    seq_lens: np.ndarray  # int32 [S]
    block_tables: np.ndarray  # int32 [S, max blocks]
    max_query_len: int
    max_seq_len: int
    lora: Ranges
    logits_rows: np.ndarray  # int64 [L]: a row for each of `histories`, then those of `prompt_targets` and `pooled`
    logits_lora: Ranges  # `lora` of these rows, numbered as in `logits_rows`
    num_drawn: tuple[int, ...]  # how many of `histories` are of each request, in order; its last rows are theirs
    histories: tuple[History, ...]
    prompt_targets: tuple[PromptTargets, ...]
    pooled: tuple[PooledRows, ...]
    unread: tuple[tuple[int, int], ...] = ()  # rows whose token the step before draws, and the ids of their requests
    copied_blocks: tuple[tuple[int, int], ...] = ()  # blocks, and those that get their contents before the step


def step_arrays(plan: StepPlan, block_size: int, drafts_apart: bool = False) -> StepArrays:
    """Lay the plan's tokens side by side and say where each one sits in its sequence and in the cache.

    drafts_apart: each draft is a sequence of one token, as captured graphs want them. What it attends to is the same:
    a layer stores all keys and values of a step before it reads any.
    """
    scheduled = plan.scheduled
    sequences = _sequences(scheduled, drafts_apart)
    counts = np.array([count for _, _, count in sequences], dtype=np.int32)
    computed = np.array([first for _, first, _ in sequences], dtype=np.int64)
    starts = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    seq_lens = (computed + counts).astype(np.int32)

    max_seq_len = int(seq_lens.max())
    tables = _block_tables([item for item, _, _ in sequences], -(-max_seq_len // block_size))
    sequence_of = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(starts[-1]) - starts[:-1][sequence_of] + computed[sequence_of]
    slots = tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size

    bounds = [0, *accumulate(item.num_rows for item in scheduled)]
    ranges = _lora_ranges(scheduled, bounds)
    num_drawn, histories, drawn_rows = _drawn(scheduled, bounds)
    prompt_rows, targets = _prompt_targets(scheduled, bounds)
    pooled_rows, pooled = _pooled_rows(scheduled, bounds)
    logits_rows = drawn_rows + prompt_rows + pooled_rows
    return StepArrays(
        token_ids=_token_ids(scheduled),
        positions=positions,
        slot_mapping=slots,
        query_starts=starts,
        seq_lens=seq_lens,
        block_tables=tables,
        max_query_len=int(counts.max()),
        max_seq_len=max_seq_len,
        lora=ranges,
        logits_rows=np.array(logits_rows, dtype=np.int64),
        logits_lora=ranges if len(histories) == len(positions) else _ranges_of_rows(ranges, logits_rows),
        num_drawn=tuple(num_drawn),
        histories=tuple(histories),
        prompt_targets=targets,
        pooled=pooled,
        unread=_unread(scheduled, bounds),
        copied_blocks=tuple(item.copied_block for item in scheduled if item.copied_block is not None),
    )


def head_rows(step: StepArrays) -> Iterator[tuple[int, int]]:
    """Which of `logits_rows` go through the head together, in the order in which they do."""
    row = len(step.histories)
    if row:
        yield 0, row
    for target in step.prompt_targets:
        for first in range(0, len(target.token_ids), PROMPT_LOGPROB_ROWS):
            count = min(PROMPT_LOGPROB_ROWS, len(target.token_ids) - first)
            yield row, row + count
            row += count


def _sequences(scheduled: Sequence[ScheduledRequest], drafts_apart: bool) -> list[tuple[ScheduledRequest, int, int]]:
    """Each sequence of the step: whose it is, the position of its first token, and its tokens."""
    if not drafts_apart:
        return [(item, item.num_computed_tokens, item.num_rows) for item in scheduled]
    found: list[tuple[ScheduledRequest, int, int]] = []
    for item in scheduled:
        first_draft = item.num_computed_tokens + item.num_new_tokens
        found.append((item, item.num_computed_tokens, item.num_new_tokens))
        found.extend((item, first_draft + place, 1) for place in range(len(item.draft_token_ids)))
    return found


def _drawn(scheduled: Sequence[ScheduledRequest], bounds: Sequence[int]) -> tuple[list[int], list[History], list[int]]:
    """How many tokens are drawn of each request, what each of them is drawn by, and its row."""
    num_drawn: list[int] = []
    histories: list[History] = []
    rows: list[int] = []
    for item, end in zip(scheduled, bounds[1:], strict=True):
        if not item.samples:
            num_drawn.append(0)
            continue
        found = History.each(item.request, item.draft_token_ids)
        num_drawn.append(len(found))
        histories += found
        rows += range(end - len(found), end)
    return num_drawn, histories, rows


def _token_ids(scheduled: Sequence[ScheduledRequest]) -> np.ndarray:
    tokens: list[int] = []
    for item in scheduled:
        first = item.num_computed_tokens
        if item.num_new_tokens == 1:
            tokens.append(item.request.token_ids[first])
        else:
            tokens.extend(item.request.token_ids[first : first + item.num_new_tokens])
        if item.draft_token_ids:
            tokens.extend(item.draft_token_ids)
    return np.array(tokens, dtype=np.int64)


def _unread(scheduled: Sequence[ScheduledRequest], bounds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """A token that is not read yet is the last of its request, which has no drafts."""
    return tuple(
        (end - 1, item.request.request_id)
        for item, end in zip(scheduled, bounds[1:], strict=True)
        if item.request.token_ids[-1] == UNREAD and item.catches_up
    )


def _block_tables(scheduled: Sequence[ScheduledRequest], width: int) -> np.ndarray:
    """A request may hold more blocks than its tokens of this step need."""
    tables = np.zeros((len(scheduled), width), dtype=np.int32)
    for row, item in enumerate(scheduled):
        block_ids = item.request.block_ids[:width]
        tables[row, : len(block_ids)] = block_ids
    return tables


def _lora_ranges(scheduled: Sequence[ScheduledRequest], bounds: Sequence[int]) -> Ranges:
    """The range of each adapter's adjacent rows; what comes before an invocation is the base's.

    bounds: the first row of each request, and the end of the last.
    """
    ranges: list[tuple[int, int, int]] = []
    for item, start, end in zip(scheduled, bounds, bounds[1:], strict=False):
        slot = item.request.adapter_slot
        if slot is None or item.request.adapter_start is None:
            continue
        if item.request.adapter_start > item.num_computed_tokens:
            start += item.request.adapter_start - item.num_computed_tokens
            if start >= end:
                continue
        if ranges and ranges[-1][0] == slot and ranges[-1][2] == start:
            ranges[-1] = (slot, ranges[-1][1], end)
        else:
            ranges.append((slot, start, end))
    return tuple(ranges)


def _ranges_of_rows(ranges: Ranges, rows: Sequence[int]) -> Ranges:
    """The adapters' ranges among some selected rows, numbered by their place in the selection."""
    found: list[tuple[int, int, int]] = []
    if not ranges:
        return ()
    slots, starts, ends = zip(*ranges, strict=True)
    nearest = np.searchsorted(starts, rows, side="right") - 1  # -1: before the first
    for place, (row, index) in enumerate(zip(rows, nearest.tolist(), strict=True)):
        if index < 0 or row >= ends[index]:
            continue
        if found and found[-1][0] == slots[index] and found[-1][2] == place:
            found[-1] = (slots[index], found[-1][1], place + 1)
        else:
            found.append((slots[index], place, place + 1))
    return tuple(found)


def _prompt_targets(
    scheduled: Sequence[ScheduledRequest], bounds: Sequence[int]
) -> tuple[list[int], tuple[PromptTargets, ...]]:
    """The rows that predict a prompt token whose log-probability was asked for, and these tokens by request."""
    rows: list[int] = []
    targets: list[PromptTargets] = []
    for item, start in zip(scheduled, bounds, strict=False):
        request, num_top = item.request, item.request.sampling.num_prompt_logprobs
        if num_top is None:
            continue
        next_token = item.num_computed_tokens + 1  # the first row predicts the token after its own
        first = max(next_token, request.sampling.prompt_logprobs_from)
        token_ids = request.token_ids[first : min(next_token + item.num_new_tokens, request.num_prompt_tokens)]
        rows.extend(range(start + first - next_token, start + first - next_token + len(token_ids)))
        beside = Wanted(num_top, request.sampling.logprob_token_ids)
        targets.append(PromptTargets(request.request_id, token_ids, beside))
    return rows, tuple(targets)


def _pooled_rows(
    scheduled: Sequence[ScheduledRequest], bounds: Sequence[int]
) -> tuple[list[int], tuple[PooledRows, ...]]:
    """The rows that the requests' poolings count in this step, and what they are for."""
    rows: list[int] = []
    found: list[PooledRows] = []
    for item, start, end in zip(scheduled, bounds, bounds[1:], strict=False):
        request, params = item.request, item.request.pooling
        if params is None or not (item.catches_up or params.reads_all_tokens):
            continue
        first = start if params.reads_all_tokens else end - 1
        rows.extend(range(first, end))
        before = bytes(request.pooled) if params.method is PoolingMethod.MEAN else b""
        found.append(
            PooledRows(
                request.request_id,
                params,
                request.adapter_slot,
                end - first,
                request.num_tokens,
                item.catches_up,
                before,
            )
        )
    return rows, tuple(found)
