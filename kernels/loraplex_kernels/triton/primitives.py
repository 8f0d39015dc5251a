"""Parts of several kernels: tiles, finding a tile's rows, and the product of two tiles."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LEAST_STEP = tl.constexpr(16)  # what tensor cores multiply at a time
PROGRAMS_EACH = 2  # of a multiprocessor, where a constant number of programs share out what there is to do
RANGES_AT_ONCE = tl.constexpr(256)  # that such a program counts: more would not fit into registers

# The interpreter (TRITON_INTERPRET=1) multiplies bfloat16 tiles as if they were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """The tile of one kind of launch, and how the compiler is to spread it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def locate_tile(
    starts: tl.tensor,  # int32 [G], ascending: the first row of each range
    num_ranges: tl.tensor,
    tile: tl.tensor,
    BLOCK_M: tl.constexpr,  # rows of a tile
) -> tl.tensor:
    """The range that a tile belongs to, when range g owns the tiles from starts[g] // BLOCK_M + g on.

    That numbering leaves every range at least as many tiles as it has rows to fill, and T // BLOCK_M + G are enough for
    all: the grid follows from sizes that the host knows, and what is inside the ranges stays on the device.
    """
    low = tl.full((), 0, tl.int32)
    high = num_ranges
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def locate_work(through: tl.tensor, work: tl.tensor) -> tl.tensor:
    """The range that a piece of work belongs to, and its number in there, when the pieces of some ranges are numbered
    in a row and through[g] of them belong to ranges up to g.  through: int32 [G], of which the last count all"""
    before = through <= work
    return tl.sum(before.to(tl.int32), axis=0), work - tl.max(tl.where(before, through, 0), axis=0)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """accumulator + a b, in float32. float32 operands are not rounded to tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
