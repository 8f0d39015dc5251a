"""Draws tokens from logits, for all rows of a step at once: lays out what the rows ask for, as the operations take it.

A row's token depends on that row alone: its logits, its history, its parameters, and one random number that is a
function of (seed, position). So a sampled stream is the same whoever shares the batch, after a preemption too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.execution.arrays import History, Wanted, named_ids
from loraplex_engine.execution.candidates import Candidates, candidates
from loraplex_engine.execution.form_masks import TokenMask
from loraplex_engine.link.messages import TokenLogprobs
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.step import SampledToken
from loraplex_kernels.draws import Draws, LogitChanges, Penalties, RowTokens, Watermarks
from loraplex_kernels.ops import Ops
from loraplex_kernels.transfers import Reading, to_device

SEED_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of a step, while the device may still be drawing them."""

    token_ids: Tensor  # int64 [S], on the device; -1: the row has none
    reading: Reading[list[SampledToken | None]]  # None: likewise


class Sampler:
    """Draws one token per row. Stateless: what came before is in the histories."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def sample(self, logits: Tensor, histories: Sequence[History], mask: TokenMask | None = None) -> Drawn:
        """Draw the token of each row; none where the logits are NaN or infinite, or `mask` leaves nothing.

        logits: float32 [S, V], row s belongs to histories[s]; may be overwritten.
        """
        told = [row for row, history in enumerate(histories) if history.sampling.tells_more]
        searched = [row for row in told if histories[row].sampling.num_candidates]
        asked = [row for row in told if not histories[row].sampling.num_candidates]
        as_drawn = [row for row in asked if histories[row].sampling.processed_logprobs]
        as_given = [row for row in asked if not histories[row].sampling.processed_logprobs]
        on_device = self._on_device(as_given, as_drawn, searched)
        # Before anything is changed. On the CPU an index in brackets takes five times as long.
        given = logits.index_select(0, on_device[0]) if as_given else None
        own = logits.index_select(0, on_device[2]) if searched else None
        if own is not None:  # what is changed, as transformers has it, is the log-probabilities
            logits[on_device[2]] = torch.log_softmax(own, dim=-1)
        self.ops.adjust_logits(logits, logit_changes(histories, logits.shape[-1]))
        if mask is not None:
            self.ops.mask_logits(logits, mask.rows, torch.from_numpy(mask.bits))
        drawn_by = draws(histories)
        changed = logits.index_select(0, on_device[1]) if as_drawn else None
        found: list[tuple[Sequence[int], Reading[list[Candidates | None]]]] = []
        if own is not None:
            params = [histories[row].sampling for row in searched]
            found.append((searched, candidates(self.ops, logits.index_select(0, on_device[2]), own, params)))
        token_ids = self.ops.draw_tokens(logits, drawn_by)
        details: list[tuple[Sequence[int], Reading[list[TokenLogprobs]]]] = []
        if given is not None:
            details.append((as_given, self._details(given, token_ids[on_device[0]], as_given, histories)))
        if changed is not None:
            self.ops.cut_logits(changed, drawn_by.of(np.array(as_drawn, dtype=np.int64)))
            details.append((as_drawn, self._details(changed, token_ids[on_device[1]], as_drawn, histories)))
        return Drawn(token_ids, _sampled(token_ids, details, found))

    def _on_device(self, *rows: Sequence[int]) -> list[Tensor]:
        """The numbers of some rows, for each of their uses; nothing where there are none."""
        if not any(rows):
            return []
        return to_device([np.array(each, dtype=np.int64) for each in rows], self.ops.device)

    def _details(
        self, logits: Tensor, token_ids: Tensor, rows: Sequence[int], histories: Sequence[History]
    ) -> Reading[list[TokenLogprobs]]:
        """The log-probabilities that these rows ask for. logits: float32 [R, V], token_ids: int64 [R]"""
        params = [histories[row].sampling for row in rows]
        asked = [Wanted(each.num_logprobs or 0, each.logprob_token_ids) for each in params]
        return describe(self.ops, logits, token_ids.clamp(min=0), asked)


def _sampled(
    token_ids: Tensor,
    details: Sequence[tuple[Sequence[int], Reading[list[TokenLogprobs]]]],
    found: Sequence[tuple[Sequence[int], Reading[list[Candidates | None]]]],
) -> Reading[list[SampledToken | None]]:
    """The tokens with what is told beside them; of rows that are searched, what may follow."""

    def finish(here: Iterator[Tensor]) -> list[SampledToken | None]:
        tokens: list[int] = next(here).tolist()
        beside: dict[int, TokenLogprobs] = {}
        for rows, reading in details:
            beside |= zip(rows, reading.finish(here), strict=True)
        sampled = [_token(token, beside.get(row)) for row, token in enumerate(tokens)]
        for rows, searched in found:
            for row, some in zip(rows, searched.finish(here), strict=True):
                sampled[row] = None if some is None else SampledToken(tokens[row], None, some)
        return sampled

    tensors = [token_ids, *(tensor for _, reading in details for tensor in reading.tensors)]
    return Reading([*tensors, *(tensor for _, searched in found for tensor in searched.tensors)], finish)


def _token(token_id: int, logprobs: TokenLogprobs | None) -> SampledToken | None:
    if token_id < 0 or (logprobs is not None and math.isnan(logprobs.logprob)):
        return None
    return SampledToken(token_id, logprobs)


def describe(ops: Ops, logits: Tensor, token_ids: Tensor, wanted: Sequence[Wanted]) -> Reading[list[TokenLogprobs]]:
    """The log-probability of each row's token, and of those that are wanted beside it.

    logits: float32 [S, V], token_ids: int64 [S]
    """
    tokens, named = token_ids[:, None], named_ids(wanted)
    if named.size:
        tokens = torch.cat((tokens, *to_device([named], ops.device)), dim=1)
    found = ops.likelihoods(logits, tokens, max((each.num_top for each in wanted), default=0))

    def finish(here: Iterator[Tensor]) -> list[TokenLogprobs]:
        columns = [next(here).tolist() for _ in range(1 + len(found))]
        return [
            _token_logprobs(token, own, rank, ids, tops, asked)
            for token, own, rank, ids, tops, asked in zip(*columns, wanted, strict=True)
        ]

    return Reading([token_ids, *found], finish)


def _token_logprobs(
    token_id: int, own: list[float], rank: int, top_ids: list[int], tops: list[float], wanted: Wanted
) -> TokenLogprobs:
    logprob, *named = own
    count = min(wanted.num_top, len(tops) - tops.count(-math.inf))
    return TokenLogprobs(token_id, logprob, rank, top_ids[:count], tops[:count], named[: len(wanted.named)])


def draws(histories: Sequence[History]) -> Draws:
    """How the token of each row is drawn."""
    params = [history.sampling for history in histories]
    if all(p.greedy for p in params):
        return Draws.greedy(len(params))
    return Draws(
        temperatures=np.array([0.0 if p.greedy else p.temperature for p in params]),
        top_k=np.array([p.top_k for p in params]),
        top_p=np.array([p.top_p for p in params]),
        min_p=np.array([p.min_p for p in params]),
        typical_p=np.array([p.typical_p for p in params]),
        seeds=np.array([p.seed & SEED_BITS for p in params], dtype=np.uint64),
        positions=np.array([history.num_tokens for history in histories]),
    )


def logit_changes(histories: Sequence[History], vocab_size: int) -> LogitChanges:
    """What the rows' parameters change in their logits."""
    limits = np.array([history.sampling.num_token_ids or vocab_size for history in histories])
    changed = {row: history for row, history in enumerate(histories) if history.changes_logits}
    if not changed:
        return LogitChanges(limits)
    biases = {row: h.sampling.logit_bias for row, h in changed.items() if h.sampling.logit_bias}
    allowed = {row: ids for row, h in changed.items() if (ids := h.sampling.allowed_token_ids) is not None}
    endings = {row: ids for row, h in changed.items() if h.may_not_end and (ids := _endings(h.sampling))}
    return LogitChanges(
        limits=limits,
        penalties=_penalties(changed),
        bias=RowTokens.of(list(biases), [list(bias) for bias in biases.values()]),
        bias_values=np.array([value for bias in biases.values() for value in bias.values()], dtype=np.float32),
        allowed=RowTokens.of(list(allowed), list(allowed.values())),
        forbidden=RowTokens.of(list(endings), list(endings.values())),
        watermarks=_watermarks(changed),
    )


def _watermarks(histories: Mapping[int, History]) -> Watermarks | None:
    marked = {row: mark for row, history in histories.items() if (mark := history.sampling.watermark) is not None}
    if not marked:
        return None
    return Watermarks(
        rows=np.array(list(marked)),
        seeds=np.array([histories[row].green_seed for row in marked], dtype=np.uint64),
        gammas=np.array([mark.gamma for mark in marked.values()]),
        deltas=np.array([mark.delta for mark in marked.values()], dtype=np.float32),
    )


def _endings(sampling: SamplingParams) -> tuple[int, ...]:
    return sampling.eos_token_ids + sampling.stop_token_ids


def _penalties(histories: Mapping[int, History]) -> Penalties | None:
    penalised = {row: history for row, history in histories.items() if history.sampling.needs_penalties}
    tokens = RowTokens.of(list(penalised), [history.counts.token_ids for history in penalised.values()])
    if tokens is None:
        return None
    params = [history.sampling for history in penalised.values()]
    return Penalties(
        tokens=tokens,
        counts=np.concatenate([history.counts.in_output for history in penalised.values()]),
        repetition=np.array([p.repetition_penalty for p in params]),
        presence=np.array([p.presence_penalty for p in params]),
        frequency=np.array([p.frequency_penalty for p in params]),
    )
