"""The dense linears of several experts in one launch: each tile of rows belongs to one expert, found on the device."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import PackedLinear
from loraplex_kernels.reference import ReferenceGroup, ReferenceLinear
from loraplex_kernels.triton.primitives import Tile, dot, locate_tile


class TritonGroup(ReferenceGroup):
    """The linears of several experts, and the addresses of dense ones on the device."""

    def __init__(self, experts: Sequence[PackedLinear], device: torch.device) -> None:
        super().__init__(experts)
        dense = [expert for expert in experts if isinstance(expert, ReferenceLinear)]
        self.weights: Tensor | None = None  # int64 [E], addresses of [N, C]; None: they are multiplied one by one
        self.biases: Tensor | None = None  # int64 [E], of [N]
        readable = [each for each in dense if each.weight.is_contiguous() and each.weight.data_ptr() % 16 == 0]
        if len(readable) < len(experts):
            return
        self.weights = torch.tensor([each.weight.data_ptr() for each in dense], device=device)
        biases = [each.bias.data_ptr() for each in dense if each.bias is not None]
        self.biases = torch.tensor(biases, device=device) if biases else None


@triton.jit(do_not_specialize=["num_experts"], do_not_specialize_on_alignment=["starts"])
def _grouped_linear(
    x: tl.tensor,  # [R, C]
    y: tl.tensor,  # [R, N]
    weights: tl.tensor,  # int64 [E]
    biases: tl.tensor,  # int64 [E], read if HAS_BIAS
    starts: tl.tensor,  # int32 [E + 1]
    num_experts: tl.tensor,
    out_features: tl.tensor,  # N
    in_features: tl.tensor,  # C
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    expert = locate_tile(starts, num_experts, tile, BLOCK_M)
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    first = start + (tile - (start // BLOCK_M + expert)) * BLOCK_M
    if first >= end:
        return
    weight = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty)), 16)
    rows = first + tl.arange(0, BLOCK_M)
    row_mask = (rows < end)[:, None]
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = (columns < out_features)[None, :]
    x_rows = x + rows.to(tl.int64)[:, None] * in_features
    w_columns = weight + columns.to(tl.int64)[None, :] * in_features
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, in_features, BLOCK_C):
        inputs = step + tl.arange(0, BLOCK_C)
        inside = inputs < in_features
        x_tile = tl.load(x_rows + inputs[None, :], mask=row_mask & inside[None, :], other=0)
        w_tile = tl.load(w_columns + inputs[:, None], mask=column_mask & inside[:, None], other=0)
        sums = dot(x_tile, w_tile, sums)
    if HAS_BIAS:
        bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
        sums += tl.load(bias + columns, mask=columns < out_features, other=0).to(tl.float32)[None, :]
    place = y + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=row_mask & column_mask)


def grouped_linear(x: Tensor, group_starts: Tensor, group: TritonGroup) -> Tensor:
    """`Ops.grouped_linear` of dense experts. The grid follows from the numbers of rows and experts alone."""
    assert group.weights is not None
    x, num_experts = x.contiguous(), len(group.experts)
    y = x.new_empty((len(x), group.out_features))
    if not len(x):
        return y
    tile = _choose_tile(x, num_experts)
    num_tiles = len(x) // tile.block_m + num_experts
    _grouped_linear[(num_tiles, triton.cdiv(group.out_features, tile.block_n))](
        x,
        y,
        group.weights,
        group.weights if group.biases is None else group.biases,
        group_starts.to(torch.int32),
        num_experts,
        group.out_features,
        group.in_features,
        HAS_BIAS=group.biases is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_C=16 if x.dtype == torch.float32 else 64,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def _choose_tile(x: Tensor, num_experts: int) -> Tile:
    """Few rows for each expert: their weights decide the time; many: the products."""
    if x.dtype == torch.float32:
        return Tile(32, 32, num_warps=4, num_stages=1)
    return Tile(16, 64, 4, 3) if len(x) <= 16 * num_experts else Tile(64, 128, 4, 3)
