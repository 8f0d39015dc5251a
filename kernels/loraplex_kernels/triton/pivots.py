"""The first tokens of a row in some order, as many as hold some sum: found by sums over all that is above a pivot.

Many pivots in one pass, then as many between two neighbours of them; nothing is sorted. Weights are added in float64
and in an order that follows from the number of tokens alone, so that the same tokens are found each time.
Source of the search by pivots instead of a sort: Qrita (arXiv 2602.01518).
"""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x7FF0000000000000)  # of all keys: an infinite distance from what is typical
MASKED = tl.constexpr(-0x7F800001)  # the key of a logit of minus infinity
ALL = tl.constexpr(2**31 - 1)
PIVOTS = tl.constexpr(16)  # in one pass


@triton.jit
def weigh(values: tl.tensor, best: tl.tensor) -> tl.tensor:
    return tl.exp(values.to(tl.float64) - best)


@triton.jit
def rank_keys(
    values: tl.tensor, distances: tl.tensor, surprise: tl.tensor, entropy: tl.tensor, TYPICAL: tl.constexpr
) -> tl.tensor:
    """What tokens are ordered by, the first the highest: their logits, or how near they are to the expected surprise.

    distances: float64, of the logits from the best; surprise: of the best token
    """
    if TYPICAL:
        return -tl.abs(surprise - distances - entropy).to(tl.int64, bitcast=True)
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # both zeros are one
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def sums_above(
    x: tl.tensor,
    count: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    bounds: tl.tensor,  # int64 [PIVOTS]
    surprise: tl.tensor,
    entropy: tl.tensor,
    TYPICAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The weight and the number of all tokens from each bound on: float64 and int32 [PIVOTS]"""
    sums = tl.zeros((PIVOTS, BLOCK), tl.float64)
    numbers = tl.zeros((PIVOTS, BLOCK), tl.int32)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < count
        values = tl.div_rn(tl.load(x + places, mask=inside, other=float("-inf")), temperature)
        distances = values.to(tl.float64) - best
        keys = rank_keys(values, distances, surprise, entropy, TYPICAL)
        above = (keys[None, :] >= bounds[:, None]) & inside[None, :]
        sums += tl.where(above, tl.exp(distances)[None, :], 0.0)
        numbers += above.to(tl.int32)
    return tl.sum(sums, axis=1), tl.sum(numbers, axis=1)


@triton.jit
def total_weight(x: tl.tensor, count: tl.tensor, best: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The sum of all weights, as a search adds them."""
    bounds = tl.zeros((PIVOTS,), tl.int64) + MASKED
    sums, _ = sums_above(x, count, 1.0, best, bounds, best, best, False, BLOCK)
    return tl.max(sums, axis=0)


@triton.jit
def search(
    x: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    target: tl.tensor,  # float64
    surprise: tl.tensor,
    entropy: tl.tensor,
    COUNTED: tl.constexpr,  # each token is one; else it is its weight
    PASSED: tl.constexpr,  # the sum must be more than the target
    TYPICAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The first key, from the highest on, at which the sum reaches the target, and how many of the tokens that have it
    are needed for that.
    """
    low = tl.full((), LOWEST if TYPICAL else MASKED, tl.int64)
    high = tl.full((), 1, tl.int64)
    if not TYPICAL:
        high = rank_keys(best.to(tl.float32), best, best, best, False) + 1
    sum_above = target * 0
    steps = tl.arange(0, PIVOTS).to(tl.int64) + 1
    while high - low > 1:  # at `low` it is reached, at `high` it is not
        width = high - low
        bounds = low + width // (PIVOTS + 1) * steps + width % (PIVOTS + 1) * steps // (PIVOTS + 1)
        sums, numbers = sums_above(x, count, 1.0, best, bounds, surprise, entropy, TYPICAL, BLOCK)
        amounts = numbers.to(tl.float64) if COUNTED else sums
        reached = amounts > target if PASSED else amounts >= target
        low = tl.maximum(low, tl.max(tl.where(reached, bounds, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, bounds), axis=0))
        sum_above = tl.maximum(sum_above, tl.max(tl.where(reached, 0.0, amounts), axis=0))
    missing = target - sum_above
    if TYPICAL:
        return low, target.to(tl.int32) * 0 + ALL  # who is equally typical stays, too
    if not COUNTED:
        bits = low.to(tl.int32)
        weight = weigh((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), best)
        missing = tl.minimum(missing / tl.where(weight > 0, weight, 1.0), ALL - 1.0)
    needed = tl.floor(missing) + 1 if PASSED else tl.ceil(missing)
    return low, tl.maximum(needed, 1).to(tl.int32)


@triton.jit
def keep_best(
    x: tl.tensor,
    ids: tl.tensor,  # not read if WHOLE
    count: tl.tensor,
    few: tl.tensor,  # may be x
    few_ids: tl.tensor,  # may be ids
    temperature: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    equals: tl.tensor,
    least: tl.tensor,
    surprise: tl.tensor,
    entropy: tl.tensor,
    WHOLE: tl.constexpr,  # x is all of a row
    TYPICAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Lay side by side the tokens with higher keys than this, and the first `equals` of those that have it, if they
    weigh at least so much. Returns their number.
    """
    kept = count * 0
    same = count * 0
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < count
        values = tl.div_rn(tl.load(x + places, mask=inside, other=float("-inf")), temperature)
        tokens = places
        if not WHOLE:
            tokens = tl.load(ids + places, mask=inside, other=0)
        distances = values.to(tl.float64) - best
        keys = rank_keys(values, distances, surprise, entropy, TYPICAL)
        equal = inside & (keys == key)
        ranks = same + tl.cumsum(equal.to(tl.int32), axis=0)
        keep = inside & ((keys > key) | (equal & (ranks <= equals))) & (tl.exp(distances) >= least)
        targets = kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.debug_barrier()  # all has been read where it is written to
        tl.store(few + targets, values, mask=keep)
        tl.store(few_ids + targets, tokens, mask=keep)
        kept += tl.sum(keep.to(tl.int32), axis=0)
        same += tl.sum(equal.to(tl.int32), axis=0)
    tl.debug_barrier()
    return kept
