"""Products with quantised weights: codes are read packed, and made into numbers tile by tile on their way to tl.dot.

Every record of the other `quantized` comes down to one form: codes, a scale and perhaps a zero for each group of input
features of each output, perhaps a table that the codes point into, perhaps an order of the inputs. Few rows leave too
few tiles for the device, so the input features are split between programs (split-K, arXiv 2402.00025) whose sums are
added up in a fixed order.
"""

# ruff: noqa: N803, N806  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.quantized import AffineWeight, Float8Weight, MinimumWeight, TableWeight
from loraplex_kernels.triton.codes import FLOAT8, PLAIN, as_codes, coding_of, decode
from loraplex_kernels.triton.primitives import LEAST_STEP, Tile, dot

WIDEST_STEP = 64  # columns multiplied at a time
FEW_ROWS = 16
TABLE_SIZE = tl.constexpr(16)
MAX_SPLITS = 16


@triton.jit
def _multiply(
    sums: tl.tensor,  # float32 [M, N]
    x_rows: tl.tensor,  # [M, 1]: where each row of x begins
    row_mask: tl.tensor,  # [M, 1]
    codes: tl.tensor,  # [STEP, N]
    first: tl.tensor,  # column of the codes
    outputs: tl.tensor,  # [N]
    out_mask: tl.tensor,  # [N]
    scales: tl.tensor,  # [G, N]
    zeros: tl.tensor,  # [G, N], read if ZEROS
    table: tl.tensor,  # float32 [16, N], read if TABLE
    order: tl.tensor,  # int32 [C], read if ORDERED
    in_features: tl.tensor,
    out_features: tl.tensor,
    CODING: tl.constexpr,
    TABLE: tl.constexpr,
    ZEROS: tl.constexpr,
    ORDERED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIFORM: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """sums + x[:, first : first + STEP] times that much of the weight."""
    columns = first + tl.arange(0, STEP)
    inside = columns < in_features
    features = columns
    if ORDERED:
        features = tl.load(order + columns, mask=inside, other=0)
    x = tl.load(x_rows + features[None, :], mask=row_mask & inside[None, :], other=0)
    # Not loaded through pointers: that would be taken for a stream of float32 weights, and run ahead of.
    weights = tl.gather(table, codes.to(tl.int32), 0) if TABLE else decode(codes, CODING)
    if UNIFORM:
        # What all columns share is multiplied once, after the sum. Past the last column, x is zero.
        group = tl.minimum(first, in_features - 1) // GROUP_SIZE
        where = group * out_features + outputs
        if ZEROS:
            weights -= tl.load(zeros + where, mask=out_mask, other=0).to(tl.float32)[None, :]
        scale = tl.load(scales + where, mask=out_mask, other=0).to(tl.float32)
        return sums + dot(x, weights.to(x.dtype), tl.zeros_like(sums)) * scale[None, :]
    where = (columns // GROUP_SIZE)[:, None] * out_features + outputs[None, :]
    mask = inside[:, None] & out_mask[None, :]
    if ZEROS:
        weights -= tl.load(zeros + where, mask=mask, other=0).to(tl.float32)
    weights *= tl.load(scales + where, mask=mask, other=0).to(tl.float32)
    return dot(x, weights.to(x.dtype), sums)


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_linear(
    x: tl.tensor,  # [T, C]
    codes: tl.tensor,  # [C / columns a byte holds, N], columns up to whole steps
    scales: tl.tensor,  # [G, N]
    zeros: tl.tensor,  # [G, N], read if ZEROS
    table: tl.tensor,  # float32 [16], read if TABLE
    order: tl.tensor,  # int32 [C], read if ORDERED
    bias: tl.tensor,  # [N], read if BIAS
    out: tl.tensor,  # [T, N], or float32 [SPLITS, T, N] if SPLITS > 1
    num_rows: tl.tensor,  # T
    in_features: tl.tensor,  # C
    out_features: tl.tensor,  # N
    NIBBLES: tl.constexpr,  # a byte holds a code of one step (low) and one of the next (high); else one code
    CODING: tl.constexpr,
    TABLE: tl.constexpr,
    ZEROS: tl.constexpr,
    ORDERED: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIFORM: tl.constexpr,  # no step crosses the end of a group
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    CHUNK: tl.constexpr = 2 * STEP if NIBBLES else STEP  # columns that a step of bytes holds
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_mask = outputs < out_features
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = (rows < num_rows)[:, None]
    split = tl.program_id(2)
    x_rows = x + rows.to(tl.int64)[:, None] * in_features
    num_chunks = tl.cdiv(in_features, CHUNK)
    share = tl.cdiv(num_chunks, SPLITS)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    values = tl.zeros((TABLE_SIZE, BLOCK_N), tl.float32)
    if TABLE:
        values += tl.load(table + tl.arange(0, TABLE_SIZE))[:, None]
    for chunk in range(split * share, tl.minimum((split + 1) * share, num_chunks)):
        byte_rows = (chunk * STEP + tl.arange(0, STEP)).to(tl.int64)
        some = tl.load(codes + byte_rows[:, None] * out_features + outputs[None, :], mask=out_mask[None, :], other=0)
        first = chunk * CHUNK
        low = some & 15 if NIBBLES else some
        sums = _multiply(
            sums, x_rows, row_mask, low, first, outputs, out_mask, scales, zeros, values, order, in_features,
            out_features, CODING, TABLE, ZEROS, ORDERED, GROUP_SIZE, UNIFORM, STEP,
        )  # fmt: skip
        if NIBBLES:
            sums = _multiply(
                sums, x_rows, row_mask, some >> 4, first + STEP, outputs, out_mask, scales, zeros, values, order,
                in_features, out_features, CODING, TABLE, ZEROS, ORDERED, GROUP_SIZE, UNIFORM, STEP,
            )  # fmt: skip
    if SPLITS == 1 and BIAS:
        sums += tl.load(bias + outputs, mask=out_mask, other=0).to(tl.float32)[None, :]
    place = out + (split * num_rows + rows).to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=row_mask & out_mask[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
    parts: tl.tensor,  # float32 [SPLITS, T, N]
    bias: tl.tensor,  # [N], read if BIAS
    y: tl.tensor,  # [T, N]
    num_rows: tl.tensor,
    out_features: tl.tensor,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = outputs < out_features
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * num_rows + row) * out_features + outputs, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias + outputs, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * out_features + outputs, total.to(y.dtype.element_ty), mask=inside)


class TritonQuantizedLinear:
    """A quantised weight as the kernels read it: up to 4 bits two codes a byte, else one; outputs side by side."""

    def __init__(self, weight: AffineWeight | MinimumWeight | TableWeight | Float8Weight, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.codes.shape
        self.bias = bias
        self.zeros: Tensor | None = None  # [G, N]
        self.table: Tensor | None = None  # float32 [16]
        self.order: Tensor | None = None  # int32 [C]: column c of the codes is input feature order[c]
        self.coding = PLAIN.value
        self.nibbles = True
        if isinstance(weight, MinimumWeight):
            weight = weight.as_affine()
        if isinstance(weight, AffineWeight):
            self.group_size = weight.group_size
            self.scales, self.zeros = narrowed(weight.scale), narrowed(weight.zero)
            self.nibbles = weight.bits <= 4
            self.order = None if weight.input_order is None else weight.input_order.int()
        elif isinstance(weight, TableWeight):
            self.group_size, self.scales = _groups_of_table(weight)
            self.table = weight.table
        else:
            self.group_size, self.scales = _groups_of_float8(weight)
            self.coding, self.nibbles = coding_of(weight.codes.dtype), False
        step = math.gcd(self.group_size, WIDEST_STEP)
        self.uniform = len(self.scales) == 1 or step >= LEAST_STEP.value
        self.step = step if self.uniform and len(self.scales) > 1 else WIDEST_STEP
        self.codes = _packed(as_codes(weight.codes), self.step, self.nibbles)
        tensors = (self.codes, self.scales, self.zeros, self.table, self.order, bias)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def dequantize(self, start: int, end: int) -> Tensor:
        """`Ops.dequantize`."""
        codes = self.codes[:, start:end]
        if self.nibbles:
            halves = codes.view(-1, self.step, codes.shape[1])
            codes = torch.stack((halves & 15, halves >> 4), dim=1).flatten(0, 2)
        codes = codes[: self.in_features]
        if self.table is not None:
            values = self.table[codes.int()]
        else:
            values = codes.view(torch.float8_e4m3fn).float() if self.coding == FLOAT8.value else codes.float()
        groups = torch.arange(self.in_features, device=codes.device) // self.group_size
        if self.zeros is not None:
            values = values - self.zeros[groups, start:end].float()
        dense = (values * self.scales[groups, start:end].float()).t()
        if self.order is None:
            return dense.contiguous()
        restored = torch.empty_like(dense)
        restored[:, self.order] = dense
        return restored


def narrowed(values: Tensor) -> Tensor:
    """float32 numbers in the smallest type that holds every one of them."""
    for dtype in (torch.uint8, torch.float16, torch.bfloat16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow
    return values


def _groups_of_table(weight: TableWeight) -> tuple[int, Tensor]:
    """A group size that fits both rows and blocks, and scales [G, N]."""
    rows, columns = weight.codes.shape
    group = math.gcd(weight.block, columns)
    starts = torch.arange(0, rows * columns, group, device=weight.codes.device)
    return group, weight.absmax[starts // weight.block].view(rows, -1).t().contiguous()


def _groups_of_float8(weight: Float8Weight) -> tuple[int, Tensor]:
    """Columns of a block, and scales [G, N]."""
    rows, columns = weight.block
    by_row = weight.scale.repeat_interleave(rows, dim=0)[: len(weight.codes)]
    return columns, by_row.t().contiguous()


def _packed(codes: Tensor, step: int, nibbles: bool) -> Tensor:
    """[N, C] → [C or C / 2, N], C rounded up to whole chunks of one or two steps."""
    chunk = 2 * step if nibbles else step
    rows, columns = codes.shape
    padded = codes.new_zeros(-(-columns // chunk) * chunk, rows)
    padded[:columns] = codes.t()
    if not nibbles:
        return padded
    low, high = padded.view(-1, 2, step, rows).unbind(1)
    return (low | high << 4).view(-1, rows)


def quantized_linear(x: Tensor, packed: TritonQuantizedLinear, num_multiprocessors: int) -> Tensor:
    """`Ops.linear`.  x: [T, C] → [T, N]"""
    num_rows, out_features, order = len(x), packed.out_features, packed.order
    if order is not None and num_rows > FEW_ROWS:
        x, order = x.index_select(1, order), None  # once, rather than by the programs of every tile of outputs
    x = x.contiguous()
    y = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if not num_rows:
        return y
    tile = _choose_tile(num_rows, x.dtype, packed.uniform)
    tiles = triton.cdiv(out_features, tile.block_n), triton.cdiv(num_rows, tile.block_m)
    splits = _choose_splits(tiles[0] * tiles[1], packed, num_multiprocessors)
    parts = y if splits == 1 else y.new_empty((splits, num_rows, out_features), dtype=torch.float32)
    _quantized_linear[(*tiles, splits)](
        x,
        packed.codes,
        packed.scales,
        packed.codes if packed.zeros is None else packed.zeros,
        packed.codes if packed.table is None else packed.table,
        packed.codes if order is None else order,
        packed.codes if packed.bias is None else packed.bias,
        parts,
        num_rows,
        packed.in_features,
        out_features,
        NIBBLES=packed.nibbles,
        CODING=packed.coding,
        TABLE=packed.table is not None,
        ZEROS=packed.zeros is not None,
        ORDERED=order is not None,
        BIAS=packed.bias is not None,
        GROUP_SIZE=packed.group_size,
        UNIFORM=packed.uniform,
        STEP=packed.step,
        SPLITS=splits,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _add_splits[(num_rows, triton.cdiv(out_features, 1024))](
            parts,
            parts if packed.bias is None else packed.bias,
            y,
            num_rows,
            out_features,
            BIAS=packed.bias is not None,
            SPLITS=splits,
            BLOCK_N=1024,
        )
    return y


def _choose_tile(num_rows: int, dtype: torch.dtype, uniform: bool) -> Tile:
    """A tile whose prefetched steps fit in 99 KiB of shared memory, the least of GPUs since Ampere. Where groups end
    within a step, it has a scale and a zero for each of its numbers, and no room for that."""
    few, num_stages = num_rows <= FEW_ROWS, 3 if uniform else 1
    if dtype == torch.float32:  # multiplied without tensor cores, which takes the registers to run ahead with
        return Tile(FEW_ROWS, 128, num_warps=8, num_stages=1) if few else Tile(32, 64, num_warps=8, num_stages=1)
    block_m, num_warps = (FEW_ROWS, 4) if few else (64, 8)
    return Tile(block_m, 128, num_warps, num_stages)


def _choose_splits(num_tiles: int, packed: TritonQuantizedLinear, num_multiprocessors: int) -> int:
    """The splits that give each multiprocessor about two programs of four steps at least: 1, 4 or 16, each a kernel."""
    wanted = min(2 * num_multiprocessors // num_tiles, len(packed.codes) // (4 * packed.step), MAX_SPLITS)
    return 16 if wanted >= 16 else 4 if wanted >= 4 else 1
