"""Segmented LoRA: shrink, then expand, each one launch for all adapters and all projections of a linear.

The device finds an adapter through a table of addresses, so every adapter keeps its own tensors at its own ranks. A
tile of rows belongs to one adapter. Shrink splits the input features between programs and writes their sums apart;
expand adds them up. All pieces of work are numbered in a row, of which program p of n takes every n-th from p on. Each
program counts them for itself, from the segments on the device, of which it looks at some hundred at a time: segments,
resident adapters and their ranks may change under a captured CUDA graph, as long as no rank exceeds the table's
capacity, and a tile's features are split between the more programs the fewer tiles there are.
"""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import LoraSegments
from loraplex_kernels.triton.lora_table import (
    A_ADDRESS,
    AFFINE_ADDRESS,
    ALIGNMENT,
    B_ADDRESS,
    ENTRY_SIZE,
    MAX_SLICES,
    NUM_SLICES,
    OUT_FEATURES,
    OUT_START,
    RANK,
    RANK_START,
    SUM_OF_RANKS,
    TritonLoraTable,
    TritonLoraTables,
)
from loraplex_kernels.triton.primitives import LEAST_STEP, PROGRAMS_EACH, RANGES_AT_ONCE, dot, locate_work

C_STEP_BYTES = 256  # of the input features that shrink takes at a time
MIDDLE_STEP = tl.constexpr(32)  # of the ranks, where there are more than LEAST_STEP …
WIDE_STEP = tl.constexpr(64)  # … and where there are more than that
R_STEP_BYTES = 64  # of the ranks that expand takes at a time: more of float32 do not fit into registers
BLOCK_N = 128
SCALED_BLOCK_N = 64
MAX_SPLITS = 16  # of the input features of a tile
ROWS_EACH = 64  # of shrunk inputs, for which there is room per program
STEP_SIZES = ["num_segments", "num_rows", "most_work", "max_splits"]  # these and
STEP_TENSORS = ["slots", "starts", "ends"]  # these must not make new kernels


@triton.jit
def _tiles_through(
    starts: tl.tensor, ends: tl.tensor, first: tl.tensor, num_segments: tl.tensor, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """Of RANGES_AT_ONCE segments from `first` on: the tiles of those up to each → int32, and the tiles of all."""
    segments = first + tl.arange(0, RANGES_AT_ONCE)
    there = segments < num_segments
    num_rows = tl.load(ends + segments, mask=there, other=0) - tl.load(starts + segments, mask=there, other=0)
    counts = tl.cdiv(num_rows, BLOCK_M)
    return tl.cumsum(counts, axis=0), tl.sum(counts, axis=0)


@triton.jit
def _count_tiles(starts: tl.tensor, ends: tl.tensor, num_segments: tl.tensor, BLOCK_M: tl.constexpr) -> tl.tensor:
    """The tiles of all segments."""
    count = 0
    for some in range(0, num_segments, RANGES_AT_ONCE):
        _, num_tiles = _tiles_through(starts, ends, some, num_segments, BLOCK_M)
        count += num_tiles
    return count


@triton.jit
def _splits(num_tiles: tl.tensor, most_work: tl.tensor, max_splits: tl.tensor) -> tl.tensor:
    """The programs that share the input features of a tile, such that there is work for as many as there are."""
    return tl.maximum(tl.minimum(most_work // tl.maximum(num_tiles, 1), max_splits), 1)


@triton.jit
def _shrink_tile(
    x_rows: tl.tensor,  # [M, 1]: where the tile's rows begin
    out_rows: tl.tensor,  # [M, 1]
    a: tl.tensor,  # [R, C]
    rank: tl.tensor,  # R
    row_mask: tl.tensor,  # [M, 1]
    in_features: tl.tensor,  # C
    first_column: tl.tensor,
    last_column: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        rank_mask = (ranks < rank)[None, :]
        a_rows = a + ranks[None, :] * in_features
        sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for step in range(first_column, last_column, BLOCK_C):
            columns = step + tl.arange(0, BLOCK_C)
            inside = columns < last_column
            x_tile = tl.load(x_rows + columns[None, :], mask=row_mask & inside[None, :], other=0)
            a_tile = tl.load(a_rows + columns[:, None], mask=rank_mask & inside[:, None], other=0)
            sums = dot(x_tile, a_tile, sums)
        tl.store(out_rows + ranks[None, :], sums, mask=row_mask & rank_mask)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _shrink(
    x: tl.tensor,  # [T, C]
    shrunk: tl.tensor,  # float32 [max splits, T, capacity]
    entries: tl.tensor,  # int64 [slots, ENTRY_SIZE]
    slots: tl.tensor,  # int32 [G]
    starts: tl.tensor,  # int32 [G]
    ends: tl.tensor,  # int32 [G]
    num_segments: tl.tensor,
    num_rows: tl.tensor,  # T
    most_work: tl.tensor,
    max_splits: tl.tensor,
    in_features: tl.tensor,  # C
    capacity: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    splits = _splits(_count_tiles(starts, ends, num_segments, BLOCK_M), most_work, max_splits)
    share = tl.cdiv(tl.cdiv(in_features, splits), BLOCK_C) * BLOCK_C
    work, before = tl.program_id(0), 0  # before: tiles of segments before `some`
    for some in range(0, num_segments, RANGES_AT_ONCE):
        through, num_tiles = _tiles_through(starts, ends, some, num_segments, BLOCK_M)
        while work < (before + num_tiles) * splits:
            segment, tile = locate_work(through, work // splits - before)
            segment += some
            split = work % splits
            rows = tl.load(starts + segment) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_mask = (rows < tl.load(ends + segment))[:, None]
            entry = entries + tl.load(slots + segment) * ENTRY_SIZE
            rank = tl.load(entry + SUM_OF_RANKS).to(tl.int32)
            a = tl.multiple_of(tl.load(entry + A_ADDRESS).to(tl.pointer_type(x.dtype.element_ty)), 16)
            x_rows = x + rows.to(tl.int64)[:, None] * in_features
            out_rows = shrunk + (split * num_rows + rows).to(tl.int64)[:, None] * capacity
            first = split * share
            last = tl.minimum(first + share, in_features)
            if rank <= LEAST_STEP:
                _shrink_tile(
                    x_rows, out_rows, a, rank, row_mask, in_features, first, last, BLOCK_M, LEAST_STEP, BLOCK_C
                )
            elif rank <= MIDDLE_STEP:
                _shrink_tile(
                    x_rows, out_rows, a, rank, row_mask, in_features, first, last, BLOCK_M, MIDDLE_STEP, BLOCK_C
                )
            else:
                _shrink_tile(x_rows, out_rows, a, rank, row_mask, in_features, first, last, BLOCK_M, WIDE_STEP, BLOCK_C)
            work += tl.num_programs(0)
        before += num_tiles


@triton.jit
def _expand_tile(
    y: tl.tensor,
    shrunk: tl.tensor,
    entry: tl.tensor,
    piece: tl.tensor,  # which slice
    first_column: tl.tensor,  # of the slice's own
    rows: tl.tensor,  # [M]
    row_mask: tl.tensor,  # [M]
    num_rows: tl.tensor,
    splits: tl.tensor,
    out_features: tl.tensor,
    capacity: tl.tensor,
    ALIGNED: tl.constexpr,  # the slice begins and ends at output columns that are multiples of ALIGNMENT
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    b = tl.multiple_of(tl.load(entry + B_ADDRESS + piece).to(tl.pointer_type(y.dtype.element_ty)), 16)
    rank_start = tl.load(entry + RANK_START + piece).to(tl.int32)
    rank = tl.load(entry + RANK + piece).to(tl.int32)
    out_start = tl.load(entry + OUT_START + piece).to(tl.int32)
    num_columns = tl.load(entry + OUT_FEATURES + piece).to(tl.int32)
    if ALIGNED:
        out_start = tl.multiple_of(out_start, ALIGNMENT)
        num_columns = tl.multiple_of(num_columns, ALIGNMENT)
    b_stride = tl.multiple_of(tl.cdiv(num_columns, ALIGNMENT) * ALIGNMENT, ALIGNMENT)
    columns = first_column + tl.arange(0, BLOCK_N)
    b_mask = (columns < b_stride)[None, :]  # between the last column and the next row are zeros
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    split_stride = num_rows.to(tl.int64) * capacity
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        rank_mask = ranks < rank
        inner_mask = row_mask[:, None] & rank_mask[None, :]
        part = rows[:, None] * capacity + (rank_start + ranks)[None, :]
        inner = tl.load(shrunk + part, mask=inner_mask, other=0)
        for split in range(1, splits):
            inner += tl.load(shrunk + split * split_stride + part, mask=inner_mask, other=0)
        b_tile = tl.load(b + ranks[:, None] * b_stride + columns[None, :], mask=rank_mask[:, None] & b_mask, other=0)
        sums = dot(inner.to(b_tile.dtype), b_tile, sums)
    place = y + rows.to(tl.int64)[:, None] * out_features + (out_start + columns)[None, :]
    before = tl.load(place, mask=mask, other=0).to(tl.float32)
    tl.store(place, (before + sums).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _expand(
    y: tl.tensor,  # [T, N], read and written
    shrunk: tl.tensor,  # float32 [max splits, T, capacity]
    entries: tl.tensor,  # int64 [slots, ENTRY_SIZE]
    slots: tl.tensor,  # int32 [G]
    starts: tl.tensor,  # int32 [G]
    ends: tl.tensor,  # int32 [G]
    num_segments: tl.tensor,
    num_rows: tl.tensor,  # T
    most_work: tl.tensor,  # of shrink
    max_splits: tl.tensor,
    out_features: tl.tensor,  # N
    capacity: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    splits = _splits(_count_tiles(starts, ends, num_segments, BLOCK_M), most_work, max_splits)
    column_tiles = tl.cdiv(out_features, BLOCK_N) + MAX_SLICES - 1  # of any slices, one after the other
    slices = tl.arange(0, MAX_SLICES)
    work, before = tl.program_id(0), 0  # before: tiles of segments before `some`
    for some in range(0, num_segments, RANGES_AT_ONCE):
        through, num_tiles = _tiles_through(starts, ends, some, num_segments, BLOCK_M)
        while work < (before + num_tiles) * column_tiles:
            segment, tile = locate_work(through, work // column_tiles - before)
            segment += some
            entry = entries + tl.load(slots + segment) * ENTRY_SIZE
            num_slices = tl.load(entry + NUM_SLICES).to(tl.int32)
            num_columns = tl.load(entry + OUT_FEATURES + slices, mask=slices < num_slices, other=0)
            columns_through = tl.cumsum(tl.cdiv(num_columns, BLOCK_N).to(tl.int32), axis=0)
            piece, column_tile = locate_work(columns_through, work % column_tiles)
            if piece < num_slices:
                rows = tl.load(starts + segment) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
                row_mask = rows < tl.load(ends + segment)
                first = column_tile * BLOCK_N
                if (tl.load(entry + OUT_START + piece) | tl.load(entry + OUT_FEATURES + piece)) % ALIGNMENT == 0:
                    _expand_tile(
                        y, shrunk, entry, piece, first, rows, row_mask, num_rows, splits, out_features, capacity,
                        True, BLOCK_M, BLOCK_R, BLOCK_N,
                    )  # fmt: skip
                else:
                    _expand_tile(
                        y, shrunk, entry, piece, first, rows, row_mask, num_rows, splits, out_features, capacity,
                        False, BLOCK_M, BLOCK_R, BLOCK_N,
                    )  # fmt: skip
            work += tl.num_programs(0)
        before += num_tiles


@triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=STEP_TENSORS)
def _scale(
    y: tl.tensor,  # [T, N], read and written
    entries: tl.tensor,  # int64 [slots, ENTRY_SIZE]
    slots: tl.tensor,  # int32 [G]
    starts: tl.tensor,  # int32 [G]
    ends: tl.tensor,  # int32 [G]
    num_segments: tl.tensor,
    out_features: tl.tensor,  # N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    column_tiles = tl.cdiv(out_features, BLOCK_N)
    work, before = tl.program_id(0), 0  # before: tiles of segments before `some`
    for some in range(0, num_segments, RANGES_AT_ONCE):
        through, num_tiles = _tiles_through(starts, ends, some, num_segments, BLOCK_M)
        while work < (before + num_tiles) * column_tiles:
            segment, tile = locate_work(through, work // column_tiles - before)
            segment += some
            address = tl.load(entries + tl.load(slots + segment) * ENTRY_SIZE + AFFINE_ADDRESS)
            if address != 0:
                affine = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)  # [2, N]
                columns = work % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
                inside = columns < out_features
                gain = tl.load(affine + columns, mask=inside, other=0)
                offset = tl.load(affine + out_features + columns, mask=inside, other=0)
                rows = tl.load(starts + segment) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
                place = y + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
                mask = (rows < tl.load(ends + segment))[:, None] & inside[None, :]
                values = tl.load(place, mask=mask, other=0).to(tl.float32) * gain[None, :] + offset[None, :]
                tl.store(place, values.to(y.dtype.element_ty), mask=mask)
            work += tl.num_programs(0)
        before += num_tiles


def segmented_lora(
    y: Tensor,  # [T, N]
    x: Tensor,  # [T, C]
    segments: LoraSegments,
    table: TritonLoraTable | TritonLoraTables,
    num_multiprocessors: int,
) -> None:
    """`Ops.segmented_lora`. The result of shrinking is rounded to the dtype of x before expanding, as in PEFT."""
    num_segments, num_rows = len(segments.slots), len(x)
    if not table.capacity or not num_segments or not num_rows:
        return
    assert x.is_contiguous()
    assert y.is_contiguous()
    table.check_dtype(x.dtype)
    longest = max(end - start for _, start, end in segments.ranges)
    block_m, num_warps = (16, 4) if longest <= 16 else (64, 8)
    block_c = C_STEP_BYTES // x.element_size()
    most_tiles = num_rows // block_m + num_segments
    num_programs = PROGRAMS_EACH * num_multiprocessors
    streaming = 2 * num_programs  # small programs that do not run ahead: others work while one waits
    # What all splits leave behind is no more than so many rows, or one split's.
    max_splits = min(MAX_SPLITS, triton.cdiv(table.in_features, block_c), max(ROWS_EACH * num_programs // num_rows, 1))
    shrunk = torch.empty((max_splits, num_rows, table.capacity), dtype=torch.float32, device=x.device)
    where = (table.entries, segments.slots, segments.starts, segments.ends, num_segments)
    column_tiles = triton.cdiv(table.out_features, BLOCK_N)
    _shrink[(min(num_programs, most_tiles * max_splits),)](
        x,
        shrunk,
        *where,
        num_rows,
        num_programs,
        max_splits,
        table.in_features,
        table.capacity,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    _expand[(min(streaming, most_tiles * (column_tiles + MAX_SLICES.value - 1)),)](
        y,
        shrunk,
        *where,
        num_rows,
        num_programs,
        max_splits,
        table.out_features,
        table.capacity,
        BLOCK_M=block_m,
        BLOCK_R=min(R_STEP_BYTES // x.element_size(), table.slice_capacity),
        BLOCK_N=BLOCK_N,
        num_warps=num_warps,
        num_stages=1,  # a rank is a step or two: nothing to run ahead of
    )
    if table.has_scaled:
        _scale[(min(streaming, most_tiles * triton.cdiv(table.out_features, SCALED_BLOCK_N)),)](
            y,
            *where,
            table.out_features,
            BLOCK_M=block_m,
            BLOCK_N=SCALED_BLOCK_N,
            num_warps=num_warps,
        )
