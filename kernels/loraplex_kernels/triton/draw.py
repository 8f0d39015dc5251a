"""Drawing tokens: one program for a row, which sorts nothing.

The first pass with pivots leaves few tokens of a row. They are laid side by side, and what cuts them further looks at
those alone.
"""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.draws import Draws
from loraplex_kernels.transfers import to_device
from loraplex_kernels.triton.pivots import (
    ALL,
    MASKED,
    PIVOTS,
    keep_best,
    rank_keys,
    search,
    sums_above,
    total_weight,
    weigh,
)
from loraplex_kernels.triton.primitives import INTERPRETED

FLOAT32_MAX = tl.constexpr(float(np.finfo(np.float32).max))


class Blocks(NamedTuple):
    """How many tokens a program looks at together. The interpreter takes as long for few as for many."""

    row: int  # of a whole row
    few: int  # with each pivot


BLOCKS = Blocks(1 << 16, 1 << 14) if INTERPRETED.value else Blocks(2048, 256)
NUM_WARPS = 8


@triton.jit
def _best(x: tl.tensor, num_tokens: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The best logit of a row, NaN if any is, and the first token that has it."""
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.full((BLOCK,), 0, tl.int32)
    spoilt = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, num_tokens, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(x + places, mask=places < num_tokens, other=float("-inf"))
        ids = tl.where(values > most, places, ids)
        most = tl.where(values > most, values, most)
        spoilt |= (values != values).to(tl.int32)
    best = tl.max(most, axis=0)
    first = tl.min(tl.where(most == best, ids, ALL), axis=0)
    return tl.where(tl.max(spoilt, axis=0) > 0, float("nan"), best), first


@triton.jit
def _near_the_best(
    x: tl.tensor,
    num_tokens: tl.tensor,
    few: tl.tensor,
    ids: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    least: tl.tensor,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Lay side by side all tokens that top-k, top-p and min-p may leave, and few others. Returns their number, and the
    weight of the whole row.
    """
    steps = tl.arange(0, PIVOTS)
    distances = 0.25 * tl.exp2(steps.to(tl.float64) * 0.5)  # 0.25 to 32, in natural logarithms
    pivots = tl.where(steps < PIVOTS - 1, best - distances, float("-inf")).to(tl.float32)
    bounds = rank_keys(pivots, pivots, best, best, False)
    sums, numbers = sums_above(x, num_tokens, temperature, best, bounds, best, best, False, FEW)
    total = tl.max(sums, axis=0)
    enough = tl.where(k > 0, numbers >= k, sums >= tl.where(p < 1, p * total, float("inf")))
    whole = (k > 0) & (p < 1)  # then top_p is of all that top_k leaves
    enough |= weigh(pivots, best) < tl.where(whole, 0.0, least)
    bound = tl.max(tl.where(enough, bounds, MASKED), axis=0)
    count = keep_best(x, ids, num_tokens, few, ids, temperature, best, bound, ALL, 0.0, best, best, True, False, BLOCK)
    return count, total


@triton.jit
def _left(
    x: tl.tensor,
    num_tokens: tl.tensor,
    few: tl.tensor,
    ids: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    least: tl.tensor,
    typical: tl.tensor,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
) -> tl.tensor:
    """Lay side by side the tokens that are left of a row, in the order of their ids. Returns their number."""
    count, total = _near_the_best(x, num_tokens, few, ids, temperature, best, k, p, least, BLOCK, FEW)
    if (k > 0) & (k < count):
        key, equals = search(few, count, best, k.to(tl.float64), best, best, True, False, False, FEW)
        count = keep_best(few, ids, count, few, ids, 1.0, best, key, equals, 0.0, best, best, False, False, FEW)
    if p < 1:
        whole = tl.where(k > 0, total_weight(few, count, best, FEW), total)
        key, equals = search(few, count, best, p * whole, best, best, False, False, False, FEW)
        count = keep_best(few, ids, count, few, ids, 1.0, best, key, equals, 0.0, best, best, False, False, FEW)
    if least > 0:
        count = keep_best(
            few,
            ids,
            count,
            few,
            ids,
            1.0,
            best,
            tl.full((), MASKED, tl.int64),
            ALL,
            least,
            best,
            best,
            False,
            False,
            FEW,
        )
    if typical < 1:
        total = total_weight(few, count, best, FEW)
        surprise = tl.log(total)
        entropy = _entropy(few, count, best, total, surprise, FEW)
        key, equals = search(few, count, best, typical * total, surprise, entropy, False, False, True, FEW)
        count = keep_best(few, ids, count, few, ids, 1.0, best, key, ALL, 0.0, surprise, entropy, False, True, FEW)
    return count


@triton.jit
def _entropy(
    x: tl.tensor, count: tl.tensor, best: tl.tensor, total: tl.tensor, surprise: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(x + places, mask=places < count, other=float("-inf"))
        weights = weigh(values, best)
        surprises = surprise - tl.where(weights > 0, values.to(tl.float64) - best, 0.0)
        sums += weights / total * surprises
    return tl.sum(sums, axis=0)


@triton.jit
def _less_than(target: tl.tensor, total: tl.tensor) -> tl.tensor:
    """A number that rounding has made no less than the sum of all becomes the next lower one."""
    return tl.minimum(target, total - total * 1.1102230246251565e-16)


@triton.jit
def _draw_of_few(
    few: tl.tensor, ids: tl.tensor, count: tl.tensor, best: tl.tensor, number: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The first token, in descending order of the logits, at which the sum of the weights passes number · total."""
    total = total_weight(few, count, best, BLOCK)
    target = _less_than(number * total, total)
    key, needed = search(few, count, best, target, best, best, False, True, False, BLOCK)
    found = tl.full((BLOCK,), -1, tl.int32)
    same = count * 0
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < count
        values = tl.load(few + places, mask=inside, other=float("-inf"))
        equal = inside & (rank_keys(values, values, best, best, False) == key)
        ranks = same + tl.cumsum(equal.to(tl.int32), axis=0)
        found = tl.maximum(found, tl.where(equal & (ranks <= needed), tl.load(ids + places, mask=inside, other=-1), -1))
        same += tl.sum(equal.to(tl.int32), axis=0)
    return tl.max(found, axis=0)


@triton.jit
def _draw_of_all(
    x: tl.tensor,
    num_tokens: tl.tensor,
    block_sums: tl.tensor,  # float64 [NUM_BLOCKS], for use here
    temperature: tl.tensor,
    best: tl.tensor,
    number: tl.tensor,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> tl.tensor:
    """The first token, in the order of the ids, at which the sum of the weights passes number · total."""
    blocks = tl.arange(0, NUM_BLOCKS)
    tl.store(block_sums + blocks, tl.zeros((NUM_BLOCKS,), tl.float64))
    tl.debug_barrier()
    for start in range(0, num_tokens, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.div_rn(tl.load(x + places, mask=places < num_tokens, other=float("-inf")), temperature)
        tl.store(block_sums + start // BLOCK, tl.sum(weigh(values, best), axis=0))
    tl.debug_barrier()
    sums = tl.load(block_sums + blocks)
    running = tl.cumsum(sums, axis=0)
    total = tl.max(running, axis=0)
    target = _less_than(number * total, total)
    block = tl.min(tl.where((running > target) & (sums > 0), blocks, NUM_BLOCKS), axis=0)
    before = tl.max(tl.where(blocks < block, running, 0.0), axis=0)
    places = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.div_rn(tl.load(x + places, mask=places < num_tokens, other=float("-inf")), temperature)
    weights = weigh(values, best)
    passed = (weights > 0) & (before + tl.cumsum(weights, axis=0) > target)
    last = tl.max(tl.where(weights > 0, places, -1), axis=0)  # rounding: the whole block does not pass it
    return tl.minimum(last, tl.min(tl.where(passed, places, ALL), axis=0))


@triton.jit
def _write_scaled(x: tl.tensor, num_tokens: tl.tensor, temperature: tl.tensor, BLOCK: tl.constexpr) -> None:
    for start in range(0, num_tokens, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_tokens
        values = tl.div_rn(tl.load(x + places, mask=inside, other=float("-inf")), temperature)
        tl.store(x + places, values, mask=inside)


@triton.jit
def _write_few(
    x: tl.tensor,
    num_tokens: tl.tensor,
    few: tl.tensor,
    ids: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Make the row what is left of it."""
    for start in range(0, num_tokens, BLOCK):
        places = start + tl.arange(0, BLOCK)
        tl.store(x + places, tl.full((BLOCK,), float("-inf"), tl.float32), mask=places < num_tokens)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < count
        values = tl.load(few + places, mask=inside, other=float("-inf"))
        tokens = tl.load(ids + places, mask=inside, other=0)
        tl.store(x + tokens, values, mask=inside & (weigh(values, best) > 0))


@triton.jit
def _draw(
    logits: tl.tensor,  # float32 [S, V]
    few: tl.tensor,  # float32 [S, V], for use here
    ids: tl.tensor,  # int32 [S, V], for use here
    block_sums: tl.tensor,  # float64 [S, NUM_BLOCKS], for use here
    temperatures: tl.tensor,  # float64 [S]
    top_k: tl.tensor,  # int64 [S]
    top_p: tl.tensor,  # float64 [S]
    min_p: tl.tensor,  # float64 [S]
    typical_p: tl.tensor,  # float64 [S]
    numbers: tl.tensor,  # float64 [S]
    drawn: tl.tensor,  # int64 [S], written if not CUT
    num_tokens: tl.tensor,  # V
    CUT: tl.constexpr,  # write what each row's token would be drawn from
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * num_tokens
    most, token = _best(x, num_tokens, BLOCK)
    warmth = tl.load(temperatures + row)
    divisor = tl.where(warmth > 0, tl.minimum(warmth, 1.0), 1.0)
    drawable = tl.abs(most.to(tl.float64)) <= FLOAT32_MAX * divisor
    token = tl.where(drawable, token, -1)
    if drawable & (warmth > 0):
        temperature = warmth.to(tl.float32)
        best = tl.div_rn(most, temperature).to(tl.float64)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least = tl.load(min_p + row)
        typical = tl.load(typical_p + row)
        if (k > 0) | (p < 1) | (least > 0) | (typical < 1):
            few += row * num_tokens
            ids += row * num_tokens
            count = _left(x, num_tokens, few, ids, temperature, best, k, p, least, typical, BLOCK, FEW)
            if CUT:
                _write_few(x, num_tokens, few, ids, count, best, BLOCK)
            else:
                token = _draw_of_few(few, ids, count, best, tl.load(numbers + row), FEW)
        elif CUT:
            _write_scaled(x, num_tokens, temperature, BLOCK)
        else:
            sums = block_sums + row * NUM_BLOCKS
            token = _draw_of_all(x, num_tokens, sums, temperature, best, tl.load(numbers + row), BLOCK, NUM_BLOCKS)
    if not CUT:
        tl.store(drawn + row, token.to(tl.int64))


def draw_tokens(logits: Tensor, draws: Draws, device: torch.device) -> Tensor:
    """logits: float32 [S, V], contiguous → int64 [S]"""
    drawn = torch.empty(len(logits), dtype=torch.int64, device=device)
    _launch(logits, draws, drawn, device, cut=False)
    return drawn


def cut_logits(logits: Tensor, draws: Draws, device: torch.device) -> None:
    """logits: float32 [S, V], contiguous, changed in place"""
    _launch(logits, draws, logits, device, cut=True)


def _launch(logits: Tensor, draws: Draws, drawn: Tensor, device: torch.device, cut: bool) -> None:
    assert logits.is_contiguous()
    num_rows, num_tokens = logits.shape
    if not num_rows:
        return
    columns = [draws.temperatures, draws.top_p, draws.min_p, draws.typical_p, draws.numbers]
    columns = [column.astype(np.float64, copy=False) for column in columns]
    temperatures, top_p, min_p, typical_p, numbers, top_k = to_device([*columns, draws.top_k], device)
    room = logits.shape if draws.cuts.any() else (1, 1)
    block = min(BLOCKS.row, triton.next_power_of_2(num_tokens))
    num_blocks = triton.next_power_of_2(triton.cdiv(num_tokens, block))
    _draw[(num_rows,)](
        logits,
        torch.empty(room, dtype=torch.float32, device=device),
        torch.empty(room, dtype=torch.int32, device=device),
        torch.empty(num_rows, num_blocks, dtype=torch.float64, device=device),
        temperatures,
        top_k,
        top_p,
        min_p,
        typical_p,
        numbers,
        drawn,
        num_tokens,
        CUT=cut,
        BLOCK=block,
        FEW=min(BLOCKS.few, triton.next_power_of_2(num_tokens)),
        NUM_BLOCKS=num_blocks,
        num_warps=NUM_WARPS,
    )
