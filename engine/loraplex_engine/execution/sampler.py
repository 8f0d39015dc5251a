"""Draws tokens from logits, for all rows of a step at once: lays out what the rows ask for, as the operations take it.

A row's token depends on that row alone: its logits, its history, its parameters, and one random number that is a
function of (seed, position). So a sampled stream is the same whoever shares the batch, after a preemption too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.execution.arrays import History, Wanted
from loraplex_engine.execution.form_masks import TokenMask
from loraplex_engine.link.messages import TokenLogprobs
from loraplex_engine.scheduling.step import SampledToken
from loraplex_kernels.ops import Ops
from loraplex_kernels.sampling import Draws, LogitChanges, Penalties, RowTokens, Watermarks

SEED_BITS = (1 << 64) - 1


class Sampler:
    """Draws one token per row. Stateless: what came before is in the histories."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def sample(
        self, logits: Tensor, histories: Sequence[History], mask: TokenMask | None = None
    ) -> list[SampledToken | None]:
        """Draw the token of each row; None where the logits are NaN or infinite, or `mask` leaves nothing.

        logits: float32 [S, V], row s belongs to histories[s]; may be overwritten.
        """
        asked = [row for row, history in enumerate(histories) if history.sampling.num_logprobs is not None]
        as_drawn = [row for row in asked if histories[row].sampling.processed_logprobs]
        as_given = [row for row in asked if not histories[row].sampling.processed_logprobs]
        given = logits[as_given] if as_given else None  # before anything is changed
        searched = [row for row, history in enumerate(histories) if history.sampling.num_candidates]
        if searched:  # what is changed, as transformers has it, is the log-probabilities
            logits[searched] = torch.log_softmax(logits[searched], dim=-1)
        self.ops.adjust_logits(logits, logit_changes(histories, logits.shape[-1]))
        if mask is not None:
            self.ops.mask_logits(logits, mask.rows, torch.from_numpy(mask.bits))
        drawn_by = draws(histories)
        changed = logits[as_drawn] if as_drawn else None
        details = _best(logits, searched, histories) if searched else {}
        token_ids = self.ops.draw_tokens(logits, drawn_by)
        if given is not None:
            details |= self._details(given, as_given, token_ids, histories)
        if changed is not None:
            drawable = [place for place, row in enumerate(as_drawn) if token_ids[row] >= 0]
            rows, left = [as_drawn[place] for place in drawable], changed[drawable]
            self.ops.cut_logits(left, drawn_by.of(np.array(rows, dtype=np.int64)))
            details |= self._details(left, rows, token_ids, histories)
        return [_sampled(token, details.get(row)) for row, token in enumerate(token_ids.tolist())]

    def _details(
        self, logits: Tensor, rows: Sequence[int], token_ids: Tensor, histories: Sequence[History]
    ) -> dict[int, TokenLogprobs]:
        """The log-probabilities that these rows ask for, by row. logits: float32 [len(rows), V]"""
        params = [histories[row].sampling for row in rows]
        asked = [Wanted(each.num_logprobs or 0, each.logprob_token_ids) for each in params]
        chosen = token_ids[rows].clamp(min=0)
        return dict(zip(rows, describe(self.ops, logits, chosen, asked), strict=True))


def _best(logits: Tensor, rows: Sequence[int], histories: Sequence[History]) -> dict[int, TokenLogprobs]:
    """The best tokens of some rows, which are logarithms already, by row."""
    counts = [histories[row].sampling.num_candidates for row in rows]
    best = torch.topk(logits[list(rows)], min(max(counts), logits.shape[-1]), dim=-1)
    found: dict[int, TokenLogprobs] = {}
    for row, count, ids, values in zip(rows, counts, best.indices.tolist(), best.values.tolist(), strict=True):
        count = min(count, len(values) - values.count(-math.inf))
        found[row] = TokenLogprobs(ids[0], values[0], 1, ids[:count], values[:count])
    return found


def _sampled(token_id: int, logprobs: TokenLogprobs | None) -> SampledToken | None:
    if token_id < 0 or (logprobs is not None and math.isnan(logprobs.logprob)):
        return None
    return SampledToken(token_id, logprobs)


def describe(ops: Ops, logits: Tensor, token_ids: Tensor, wanted: Sequence[Wanted]) -> list[TokenLogprobs]:
    """The log-probability of each row's token, and of those that are wanted beside it.

    logits: float32 [S, V], token_ids: int64 [S]
    """
    width = max((len(each.named) for each in wanted), default=0)
    tokens = token_ids[:, None]
    if width:
        named = [[*each.named, *[0] * (width - len(each.named))] for each in wanted]
        tokens = torch.cat((tokens, torch.tensor(named, device=logits.device)), dim=1)
    found = ops.likelihoods(logits, tokens, max((each.num_top for each in wanted), default=0))
    columns = (column.tolist() for column in (token_ids, *found))
    return [
        _token_logprobs(token, own, rank, ids, tops, asked)
        for token, own, rank, ids, tops, asked in zip(*columns, wanted, strict=True)
    ]


def _token_logprobs(
    token_id: int, own: list[float], rank: int, top_ids: list[int], tops: list[float], wanted: Wanted
) -> TokenLogprobs:
    logprob, *named = own
    count = min(wanted.num_top, len(tops) - tops.count(-math.inf))
    return TokenLogprobs(token_id, logprob, rank, top_ids[:count], tops[:count], named[: len(wanted.named)])


def draws(histories: Sequence[History]) -> Draws:
    """How the token of each row is drawn."""
    params = [history.sampling for history in histories]
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
    biases = {row: h.sampling.logit_bias for row, h in enumerate(histories) if h.sampling.logit_bias}
    allowed = {row: ids for row, h in enumerate(histories) if (ids := h.sampling.allowed_token_ids) is not None}
    endings = {row: ids for row, history in enumerate(histories) if (ids := _forbidden_endings(history))}
    return LogitChanges(
        limits=np.array([history.sampling.num_token_ids or vocab_size for history in histories]),
        penalties=_penalties(histories),
        bias=RowTokens.of(list(biases), [list(bias) for bias in biases.values()]),
        bias_values=np.array([value for bias in biases.values() for value in bias.values()], dtype=np.float32),
        allowed=RowTokens.of(list(allowed), list(allowed.values())),
        forbidden=RowTokens.of(list(endings), list(endings.values())),
        watermarks=_watermarks(histories),
    )


def _watermarks(histories: Sequence[History]) -> Watermarks | None:
    marked = {row: mark for row, history in enumerate(histories) if (mark := history.sampling.watermark) is not None}
    if not marked:
        return None
    return Watermarks(
        rows=np.array(list(marked)),
        seeds=np.array([histories[row].green_seed for row in marked], dtype=np.uint64),
        gammas=np.array([mark.gamma for mark in marked.values()]),
        deltas=np.array([mark.delta for mark in marked.values()], dtype=np.float32),
    )


def _forbidden_endings(history: History) -> tuple[int, ...]:
    sampling = history.sampling
    if history.num_output_tokens >= sampling.min_tokens:
        return ()
    return sampling.eos_token_ids + sampling.stop_token_ids


def _penalties(histories: Sequence[History]) -> Penalties | None:
    penalised = {row: history for row, history in enumerate(histories) if history.sampling.needs_penalties}
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
