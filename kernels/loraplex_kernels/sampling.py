"""How tokens are drawn: in plain torch, for every backend without a way of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.draws import Draws, Likelihoods, LogitChanges, Penalties, Watermarks

# Candidates looked at before a full sort. Truncated sampling keeps a handful of tokens in practice; a row that needs
# more than these falls back to all of them, with the same result.
NUM_CANDIDATES = 512

FLOAT32_MAX = float(np.finfo(np.float32).max)


class TorchSampling:
    """The operations of `Ops` that end a step, in plain torch, on any device."""

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        bits = bits.to(logits.device, non_blocking=True)
        index = torch.tensor(rows, device=logits.device)
        logits.index_put_((index,), logits[index].masked_fill_(_forbidden(bits, logits.shape[-1]), -torch.inf))

    def adjust_logits(self, logits: Tensor, changes: LogitChanges) -> None:
        _mask_rows_without_a_token(logits, changes.limits)
        if changes.penalties is not None:
            self.penalise(logits, changes.penalties)
        if changes.bias is not None:
            index = _on_device(logits, changes.bias.row_of_each, changes.bias.token_ids)
            (values,) = _on_device(logits, changes.bias_values)
            logits.index_put_(index, values, accumulate=True)
        if changes.watermarks is not None:
            self.mark(logits, changes.watermarks)
        if changes.allowed is not None:
            index = _on_device(logits, changes.allowed.row_of_each, changes.allowed.token_ids)
            kept = logits[index]
            logits[_on_device(logits, changes.allowed.rows)] = -torch.inf
            logits[index] = kept
        if changes.forbidden is not None:
            logits[_on_device(logits, changes.forbidden.row_of_each, changes.forbidden.token_ids)] = -torch.inf

    def penalise(self, logits: Tensor, penalties: Penalties) -> None:
        """The first part of `adjust_logits`."""
        tokens, counts = penalties.tokens, penalties.counts
        places = np.repeat(np.arange(len(tokens.rows)), np.diff(tokens.starts))  # among the rows with penalties
        lowered = np.where(counts > 0, penalties.presence[places] + penalties.frequency[places] * counts, 0.0)
        repetition = penalties.repetition[places]
        rows, token_ids, factor, less = _on_device(
            logits, tokens.row_of_each, tokens.token_ids, repetition.astype(np.float32), lowered.astype(np.float32)
        )
        values = logits[rows, token_ids]
        logits[rows, token_ids] = torch.where(values > 0, values / factor, values * factor) - less

    def mark(self, logits: Tensor, marks: Watermarks) -> None:
        """The third part: raise the green tokens. In whole numbers, which are the same on every device."""
        columns = marks.rows, marks.seeds.view(np.int64), marks.limits, marks.deltas
        rows, starts, most, more = _on_device(logits, *columns)
        steps = torch.arange(1, logits.shape[-1] + 1, device=logits.device) * _signed(0x9E3779B97F4A7C15)
        mixed = starts[:, None] + steps
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
        mixed ^= _shifted(mixed, 31)
        logits[rows] += (_shifted(mixed, 11) < most[:, None]) * more[:, None]

    def draw_tokens(self, logits: Tensor, draws: Draws) -> Tensor:
        token_ids, best = _most_likely(logits)
        token_ids[~drawable(best, draws.temperatures)] = -1
        random_rows = np.flatnonzero((token_ids >= 0) & (draws.temperatures > 0))
        if len(random_rows):
            token_ids[random_rows] = _draw(logits[random_rows], draws.of(random_rows))
        return torch.from_numpy(token_ids).to(logits.device)

    def cut_logits(self, logits: Tensor, draws: Draws) -> None:
        _, best = _most_likely(logits)
        rows = np.flatnonzero((draws.temperatures > 0) & drawable(best, draws.temperatures))
        if not len(rows):
            return
        warmed = draws.of(rows)
        scaled = _at_temperature(logits[rows], warmed)
        for place, (ids, weights) in _left(scaled, warmed).items():
            left = torch.from_numpy(ids[weights > 0]).to(logits.device)
            kept = scaled[place, left]
            scaled[place] = -torch.inf
            scaled[place, left] = kept
        logits[rows] = scaled

    def likelihoods(self, logits: Tensor, token_ids: Tensor, num_top: int) -> Likelihoods:
        # A float32 sum over a large vocabulary of like logits is off in the fifth digit.
        logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float64).float()
        own = logprobs.gather(-1, token_ids)
        ranks = (logits > logits.gather(-1, token_ids[:, :1])).sum(dim=-1) + 1
        top_logprobs, top_ids = torch.topk(logprobs, min(num_top, logprobs.shape[-1]), dim=-1)
        return Likelihoods(own, ranks, top_ids, top_logprobs)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, count: int) -> Tensor:
    """Words of 64 bits, each moved down, with zeros behind it."""
    return (words >> count) & ((1 << (64 - count)) - 1)


def _on_device(logits: Tensor, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array).to(logits.device) for array in arrays)


# ---- what changes the distribution ---------------------------------------------------------------------------------


def _mask_rows_without_a_token(logits: Tensor, limits: np.ndarray) -> None:
    """Mask the padding of the head beyond the tokenizer's ids: with one slice, if all rows have the same tokenizer."""
    distinct = set(limits.tolist())
    for limit in distinct:
        if limit < logits.shape[-1]:
            logits[slice(None) if len(distinct) == 1 else np.flatnonzero(limits == limit), limit:] = -torch.inf


# ---- drawing -------------------------------------------------------------------------------------------------------


def drawable(best: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Whether a row with this best logit is a distribution, also after division by its temperature: bool [S]

    The best is NaN if any logit is, and -inf if nothing is left. A single -inf below it is a probability of 0.
    """
    divisors = np.where(temperatures > 0, np.minimum(temperatures, 1.0), 1.0)
    finite: np.ndarray = np.abs(best) <= FLOAT32_MAX * divisors
    return finite


def _most_likely(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The best token of each row and its logit: int64 and float64 [S]. A NaN anywhere in a row is its best.

    On the CPU numpy finds them ten times faster than torch; from a GPU they come in one copy.
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        ids = rows.argmax(axis=-1)
        return ids, rows[np.arange(len(rows)), ids].astype(np.float64)
    best = logits.max(dim=-1)
    found = torch.stack((best.indices.double(), best.values.double())).cpu().numpy()
    return found[0].astype(np.int64), found[1]


def _draw(logits: Tensor, draws: Draws) -> list[int]:
    """One token per row by temperature, top-k, top-p, min-p and typical-p, in this order. logits: float32 [S, V].

    A token's weight is e to the distance of its logit from the best, in float64, so that in which order a backend adds
    them changes no token.
    """
    scaled = _at_temperature(logits, draws)
    left = _left(scaled, draws)
    tokens: list[int] = []
    for row, number in enumerate(draws.numbers):
        if row in left:
            ids, weights = left[row]
            tokens.append(int(ids[_pick(weights, number)]))
        else:
            values = scaled[row].double().cpu().numpy()
            tokens.append(_pick(np.exp(values - values.max()), number))
    return tokens


def _at_temperature(logits: Tensor, draws: Draws) -> Tensor:
    temperatures = torch.from_numpy(draws.temperatures.astype(np.float32)).to(logits.device)
    return logits / temperatures[:, None]


def _left(scaled: Tensor, draws: Draws) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """What is left of each row that is cut: the ids of its tokens, the best first, and their weights. 0: cut, too.

    scaled: logits at each row's temperature
    """
    best = scaled.max(dim=-1, keepdim=True).values.double()
    totals = (scaled.double() - best).exp().sum(dim=-1).cpu().numpy()
    left: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    cut = (draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)  # of the tail; typical_p alone may keep it
    few = np.flatnonzero(cut & (draws.top_k <= NUM_CANDIDATES))
    if len(few):
        k = min(NUM_CANDIDATES, scaled.shape[-1])
        for row, row_values, row_ids in zip(few.tolist(), *_best(scaled[few], k), strict=True):
            weights = _left_of_sorted(row_values, totals[row], draws, row)
            if len(weights) < k or k == scaled.shape[-1]:
                left[row] = row_ids[: len(weights)], weights
    for row in np.flatnonzero(cut | (draws.typical_p < 1)).tolist():
        if row not in left:
            values = scaled[row].double().cpu().numpy()
            order = np.argsort(-values, kind="stable")
            weights = _left_of_sorted(values[order], totals[row], draws, row)
            left[row] = order[: len(weights)], weights
    return left


def _best(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best tokens of each row, the best first: their logits and their ids, float64 and int64 [S, k].

    On the CPU numpy finds them ten times faster than torch.
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        ids = np.stack([_best_of_row(row, k) for row in rows])
        return np.take_along_axis(rows, ids, axis=1).astype(np.float64), ids
    best = torch.topk(logits, k, dim=-1)
    return best.values.double().cpu().numpy(), best.indices.cpu().numpy()


def _best_of_row(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k best, equal ones in ascending order: float32 [V] → int64 [k]

    The k-th best of the maxima of small groups is no better than the k-th best of all, and little worse.
    """
    size = min(max(len(logits) // (2 * k), 1), 16)
    maxima = logits[: len(logits) // size * size].reshape(size, -1).max(axis=0)
    bound = np.partition(maxima, -k)[-k]
    candidates = np.flatnonzero(logits >= bound)
    chosen: np.ndarray = candidates[np.argsort(-logits[candidates], kind="stable")[:k]]
    return chosen


def _left_of_sorted(logits: np.ndarray, total: float, draws: Draws, row: int) -> np.ndarray:
    """The weights of the first of these descending logits, as many as are kept. total: of the weights of all tokens."""
    distances = logits - logits[0]
    keep = _kept_of_sorted(distances, total, draws.top_k[row], draws.top_p[row], draws.min_p[row])
    return _typical_weights(distances[:keep], draws.typical_p[row])


def _kept_of_sorted(distances: np.ndarray, total: float, top_k: int, top_p: float, min_p: float) -> int:
    """The number of these tokens to keep: top_k, then top_p of the rest, then min_p.

    distances: from the best logit, descending; total: of the weights of all tokens. At least one is kept. top_p keeps
    the smallest set whose share reaches p, as transformers does after top_k has renormalised.
    """
    keep = min(top_k, len(distances)) if top_k > 0 else len(distances)
    weights = np.exp(distances[:keep])
    if top_p < 1:
        whole = weights.sum() if top_k > 0 else total
        keep = min(keep, int(np.searchsorted(np.cumsum(weights), top_p * whole)) + 1)
    if min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights[:keep] >= min_p)))
    return max(keep, 1)


def _typical_weights(distances: np.ndarray, mass: float) -> np.ndarray:
    """The weights of these tokens: 0 but for the locally typical ones that hold `mass` of them.

    Tokens that are equally typical stay or go together. Source: Meister et al., arXiv 2202.00666.
    """
    weights: np.ndarray = np.exp(distances)
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


def _forbidden(bits: Tensor, count: int) -> Tensor:
    """Whether the bit of each of `count` tokens is 0.  bits: int32 [..., W] → bool [..., count]"""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = bits.view(torch.uint8).unsqueeze(-1)
    return ((octets >> shifts) & 1).flatten(-2)[..., :count] == 0
