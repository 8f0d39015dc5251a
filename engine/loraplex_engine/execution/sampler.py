"""Draws tokens from logits, for all rows of a step at once.

A row's token depends on that row alone: its logits, its history, its parameters, and one random number that is a
function of (seed, position). So a sampled stream is the same whoever shares the batch, after a preemption too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.execution.arrays import History
from loraplex_engine.link.messages import TokenLogprobs
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.step import SampledToken

# Candidates looked at before a full sort. Truncated sampling keeps a handful of tokens in practice; a row that needs
# more than these falls back to all of them, with the same result.
NUM_CANDIDATES = 512

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Sampler:
    """Draws one token per row. Stateless: what came before is in the histories."""

    def sample(self, logits: Tensor, histories: Sequence[History]) -> list[SampledToken | None]:
        """Draw the token of each row; None where the logits are NaN or infinite.

        logits: float32 [S, V], row s belongs to histories[s]; may be overwritten.
        """
        logprobs_wanted = any(history.sampling.num_logprobs is not None for history in histories)
        raw = torch.log_softmax(logits, dim=-1) if logprobs_wanted else None  # before anything is changed
        adjust_logits(logits, histories)
        token_ids = self._draw(logits, histories)
        details = [None] * len(histories) if raw is None else _sampled_logprobs(raw, token_ids, histories)
        return [_sampled(token, detail) for token, detail in zip(token_ids, details, strict=True)]

    def _draw(self, logits: Tensor, histories: Sequence[History]) -> list[int]:
        """Draw one token per row; -1: nothing can be drawn from the row."""
        token_ids = [
            token if _is_drawable(logit, history) else -1
            for (token, logit), history in zip(most_likely(logits), histories, strict=True)
        ]
        random_rows = [
            row for row, history in enumerate(histories) if token_ids[row] >= 0 and not history.sampling.greedy
        ]
        if random_rows:
            chosen = [histories[row] for row in random_rows]
            drawn = draw(logits[random_rows], chosen)
            for row, token in zip(random_rows, drawn, strict=True):
                token_ids[row] = token
        return token_ids


def most_likely(logits: Tensor) -> list[tuple[int, float]]:
    """The best token of each row and its logit: float32 [S, V] → S pairs. A NaN anywhere in a row is its best.

    On the CPU numpy finds them ten times faster than torch; from a GPU they come in one copy.
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        ids = rows.argmax(axis=-1)
        return list(zip(ids.tolist(), rows[np.arange(len(rows)), ids].tolist(), strict=True))
    best = logits.max(dim=-1)
    pairs = torch.stack((best.indices.double(), best.values.double()), dim=1)
    return [(int(token), logit) for token, logit in pairs.tolist()]


def _is_drawable(best: float, history: History) -> bool:
    """Whether a row with this best logit is a distribution, also after division by the temperature.

    The best is NaN if any logit is, and -inf if nothing is left. A single -inf below it is a probability of 0.
    """
    sampling = history.sampling
    return abs(best) <= FLOAT32_MAX * (1.0 if sampling.greedy else min(1.0, sampling.temperature))


def _sampled(token_id: int, logprobs: TokenLogprobs | None) -> SampledToken | None:
    if token_id < 0 or (logprobs is not None and math.isnan(logprobs.logprob)):
        return None
    return SampledToken(token_id, logprobs)


# ---- what changes the distribution ---------------------------------------------------------------------------------


def adjust_logits(logits: Tensor, histories: Sequence[History]) -> None:
    """Apply penalties, biases and masks in place, each only to the rows that ask for it. logits: float32 [S, V]."""
    _mask_rows_without_a_token(logits, histories)
    _apply_penalties(logits, histories)
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, history in enumerate(histories):
        sampling = history.sampling
        if sampling.logit_bias:
            rows.extend([row] * len(sampling.logit_bias))
            columns.extend(sampling.logit_bias.keys())
            values.extend(sampling.logit_bias.values())
    if rows:
        device = logits.device
        index = (torch.tensor(rows, device=device), torch.tensor(columns, device=device))
        logits.index_put_(index, torch.tensor(values, device=device), accumulate=True)
    for row, history in enumerate(histories):
        sampling = history.sampling
        if sampling.allowed_token_ids is not None:
            allowed = torch.tensor(sampling.allowed_token_ids, device=logits.device)
            kept = logits[row, allowed]
            logits[row].fill_(-torch.inf)
            logits[row, allowed] = kept
        if history.num_output_tokens < sampling.min_tokens:
            endings = sampling.eos_token_ids + sampling.stop_token_ids
            if endings:
                logits[row, list(endings)] = -torch.inf


def _mask_rows_without_a_token(logits: Tensor, histories: Sequence[History]) -> None:
    """Mask the padding of the head beyond the tokenizer's ids: with one slice, if all rows have the same tokenizer."""
    limits = {history.sampling.num_token_ids or logits.shape[-1] for history in histories}
    for limit in limits:
        if limit < logits.shape[-1]:
            own = [row for row, history in enumerate(histories) if history.sampling.num_token_ids == limit]
            logits[slice(None) if len(limits) == 1 else own, limit:] = -torch.inf


def _apply_penalties(logits: Tensor, histories: Sequence[History]) -> None:
    """Repetition (prompt and output; CTRL, arXiv 1909.05858), presence and frequency (output) penalties, in place."""
    for row, history in enumerate(histories):
        sampling = history.sampling
        if not sampling.needs_penalties:
            continue
        if sampling.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(history.token_ids)).to(logits.device)
            values = logits[row, seen]
            penalty = sampling.repetition_penalty
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if history.num_output_tokens and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens, counts = np.unique(history.token_ids[history.num_prompt_tokens :], return_counts=True)
            penalties = torch.from_numpy(sampling.presence_penalty + sampling.frequency_penalty * counts)
            logits[row, torch.from_numpy(tokens).to(logits.device)] -= penalties.to(logits)


# ---- drawing -------------------------------------------------------------------------------------------------------


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone.

    Two rounds of SplitMix64's finaliser. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators".
    """
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & mask
    for _ in range(2):
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def draw(logits: Tensor, histories: Sequence[History]) -> list[int]:
    """One token per row by temperature, top-k, top-p, min-p and typical-p, in this order. logits: float32 [S, V]."""
    params = [history.sampling for history in histories]
    numbers = [uniform(history.sampling.seed, history.num_tokens) for history in histories]
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=logits.device)
    logprobs = torch.log_softmax(logits / temperatures[:, None], dim=-1)

    tokens = [-1] * len(params)
    truncated = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1]
    few = [row for row in truncated if _needs_few_candidates(params[row])]
    if few:
        k = min(NUM_CANDIDATES, logits.shape[-1])
        values, ids = torch.topk(logprobs[few], k, dim=-1)
        for row, row_values, row_ids in zip(few, values.double().cpu().numpy(), ids.cpu().numpy(), strict=True):
            keep = _kept_of_sorted(row_values, params[row].top_k, params[row].top_p, params[row].min_p)
            if keep < k or k == logits.shape[-1]:
                weights = _typical_weights(row_values[:keep], params[row].typical_p)
                tokens[row] = int(row_ids[_pick(weights, numbers[row])])
    for row in truncated:
        if tokens[row] < 0:
            tokens[row] = _draw_sorted(logprobs[row].double().cpu().numpy(), histories[row], numbers[row])
    for row in range(len(params)):
        if tokens[row] < 0:
            tokens[row] = _pick(np.exp(logprobs[row].double().cpu().numpy()), numbers[row])
    return tokens


def _needs_few_candidates(sampling: SamplingParams) -> bool:
    """Whether a row can be drawn from its best few tokens. With typical_p alone, unlikely ones may remain."""
    cuts_the_tail = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return cuts_the_tail and sampling.top_k <= NUM_CANDIDATES


def _draw_sorted(logprobs: np.ndarray, history: History, number: float) -> int:
    """Draw from a whole row. logprobs: float64 [V]"""
    sampling = history.sampling
    order = np.argsort(-logprobs, kind="stable")
    keep = _kept_of_sorted(logprobs[order], sampling.top_k, sampling.top_p, sampling.min_p)
    weights = _typical_weights(logprobs[order[:keep]], sampling.typical_p)
    return int(order[_pick(weights, number)])


def _kept_of_sorted(logprobs: np.ndarray, top_k: int, top_p: float, min_p: float) -> int:
    """The number of these descending log-probabilities to keep: top_k, then top_p of the rest, then min_p.

    At least one. top_p keeps the smallest set whose share reaches p, as transformers does after top_k has renormalised.
    """
    keep = min(top_k, len(logprobs)) if top_k > 0 else len(logprobs)
    probs = np.exp(logprobs[:keep])
    if top_p < 1:
        total = probs.sum() if top_k > 0 else 1.0
        keep = min(keep, int(np.searchsorted(np.cumsum(probs), top_p * total)) + 1)
    if min_p > 0:
        keep = min(keep, int(np.count_nonzero(probs[:keep] >= min_p * probs[0])))
    return max(keep, 1)


def _typical_weights(logprobs: np.ndarray, mass: float) -> np.ndarray:
    """The probabilities of these tokens, not normalised: 0 but for the locally typical ones that hold `mass` of them.

    Tokens that are equally typical stay or go together. Source: Meister et al., arXiv 2202.00666.
    """
    weights: np.ndarray = np.exp(logprobs)
    if mass >= 1:
        return weights
    probs = weights / weights.sum()
    surprise = -np.log(probs, where=probs > 0, out=np.full(len(probs), -np.inf))
    entropy = np.sum(np.multiply(probs, surprise, where=probs > 0, out=np.zeros(len(probs))))
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int(np.searchsorted(np.cumsum(probs[order]), mass)), len(order) - 1)
    return np.where(distance <= distance[order[last]], weights, 0.0)


def _pick(weights: np.ndarray, number: float) -> int:
    """The index at which the running sum of the weights passes `number` of their total."""
    sums = np.cumsum(weights)
    return min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(weights) - 1)


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def _sampled_logprobs(
    logprobs: Tensor, token_ids: Sequence[int], histories: Sequence[History]
) -> list[TokenLogprobs | None]:
    counts = [history.sampling.num_logprobs for history in histories]
    rows = [row for row, count in enumerate(counts) if count is not None and token_ids[row] >= 0]
    wanted = describe(
        logprobs[rows], [token_ids[row] for row in rows], max(count for count in counts if count is not None)
    )
    details: list[TokenLogprobs | None] = [None] * len(histories)
    for row, detail in zip(rows, wanted, strict=True):
        count = counts[row]
        details[row] = TokenLogprobs(
            detail.token_id, detail.logprob, detail.rank, detail.top_ids[:count], detail.top_logprobs[:count]
        )
    return details


def describe(logprobs: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """The log-probability of each row's token, and of its `num_top` most likely ones. logprobs: [S, V]."""
    chosen = torch.tensor(token_ids, device=logprobs.device)[:, None]
    own = logprobs.gather(-1, chosen)
    ranks = (logprobs > own).sum(dim=-1) + 1
    top_values, top_ids = torch.topk(logprobs, min(num_top, logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprobs(*row)
        for row in zip(
            token_ids, own[:, 0].tolist(), ranks.tolist(), top_ids.tolist(), top_values.tolist(), strict=True
        )
    ]
