"""Products of integers: a kernel that rounds the inputs, and one that multiplies bytes by bytes on tensor cores."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.integers import HIGHEST, LOWEST
from loraplex_kernels.quantized import IntegerWeight
from loraplex_kernels.triton.codes import INT8, encode
from loraplex_kernels.triton.primitives import Tile

SYMMETRIC, ASYMMETRIC, GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
MIDDLE_CODES = tl.constexpr(HIGHEST)
ALL_CODES = tl.constexpr(HIGHEST - LOWEST)
LOWEST_CODE = tl.constexpr(LOWEST)
ROUNDED_AT_ONCE = 2048  # inputs
STEP = 128  # inputs multiplied at a time
FEW_ROWS = 16


@triton.jit
def _load_finite(x: tl.tensor, columns: tl.tensor, num_features: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float32, 0 where there is no number, and whether it is one."""
    values = tl.load(x + columns, mask=columns < num_features, other=0).to(tl.float32)
    finite = tl.abs(values) <= LARGEST_FLOAT
    return tl.where(finite, values, 0), finite


@triton.jit
def _round_to_codes(values: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """float32 values less a zero point, as codes."""
    return encode(tl.minimum(tl.maximum(values + zero, LOWEST_CODE), MIDDLE_CODES), INT8)


@triton.jit
def _round_inputs(
    x: tl.tensor,  # [T, C]
    codes: tl.tensor,  # int8 [T, C]
    scales: tl.tensor,  # float32 [T]
    zeros: tl.tensor,  # int32 [T]
    num_features: tl.tensor,  # C
    given_scale: tl.tensor,
    given_zero: tl.tensor,
    KIND: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """`integers.round_inputs`: one program for each row, which reads it twice."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * num_features
    lows, highs = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    unfit = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, num_features, BLOCK_C):
        values, finite = _load_finite(x_row, first + tl.arange(0, BLOCK_C), num_features)
        lows, highs = tl.minimum(lows, values), tl.maximum(highs, values)
        unfit = tl.where(finite, unfit, 1)
    low, high = tl.min(lows, axis=0), tl.max(highs, axis=0)
    zero = low * 0
    if KIND == SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-low, high), zero + MIDDLE_CODES)
    elif KIND == ASYMMETRIC:
        scale = tl.div_rn(high - low, zero + ALL_CODES)
        points = LOWEST_CODE - tl.div_rn(low, tl.where(scale > 0, scale, 1))
        zero = tl.where(scale > 0, _round_to_codes(points, 0).to(tl.float32), 0)
    else:
        scale = zero + given_scale
        zero += given_zero
    divisor = tl.where(scale > 0, scale, 1)
    for first in range(0, num_features, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        values, finite = _load_finite(x_row, columns, num_features)
        rounded = _round_to_codes(tl.div_rn(values, values * 0 + divisor), zero)
        tl.store(codes + row * num_features + columns, rounded, mask=columns < num_features)
    tl.store(scales + row, tl.where(tl.max(unfit, axis=0) > 0, float("nan"), scale))
    tl.store(zeros + row, zero.to(tl.int32))


@triton.jit(do_not_specialize=["num_rows"])
def _integer_linear(
    codes: tl.tensor,  # int8 [T, C]
    row_scales: tl.tensor,  # float32 [T]
    zeros: tl.tensor,  # int32 [T], read if ZEROS
    weights: tl.tensor,  # int8 [N, C]
    scales: tl.tensor,  # float32 [N]
    weight_sums: tl.tensor,  # int32 [N], read if ZEROS
    bias: tl.tensor,  # [N], read if BIAS
    y: tl.tensor,  # [T, N]
    num_rows: tl.tensor,  # T
    in_features: tl.tensor,  # C
    out_features: tl.tensor,  # N
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_mask, row_mask = outputs < out_features, rows < num_rows
    code_rows = codes + rows.to(tl.int64)[:, None] * in_features
    weight_columns = weights + outputs.to(tl.int64)[None, :] * in_features
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, in_features, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = columns < in_features
        some = tl.load(code_rows + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0)
        bytes_ = tl.load(weight_columns + columns[:, None], mask=out_mask[None, :] & inside[:, None], other=0)
        sums = tl.dot(some, bytes_, sums, out_dtype=tl.int32)
    if ZEROS:
        zero = tl.load(zeros + rows, mask=row_mask, other=0)
        sums -= zero[:, None] * tl.load(weight_sums + outputs, mask=out_mask, other=0)[None, :]
    products = sums.to(tl.float32) * tl.load(scales + outputs, mask=out_mask, other=0)[None, :]
    products *= tl.load(row_scales + rows, mask=row_mask, other=0)[:, None]
    if BIAS:
        products += tl.load(bias + outputs, mask=out_mask, other=0).to(tl.float32)[None, :]
    place = y + rows.to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(place, products.to(y.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


class TritonIntegerLinear:
    """Weights of a byte as the record has them: tensor cores take bytes input by input."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.codes.shape
        self.codes = weight.codes.contiguous()
        self.scale = weight.scale.contiguous()
        self.inputs = weight.inputs
        self.bias = bias
        self.sums: Tensor | None = None  # int32 [N], of each output's codes
        if not self.inputs.symmetric:
            self.sums = self.codes.sum(1, dtype=torch.int32)
        tensors = (self.codes, self.scale, self.sums, bias)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def kind(self) -> int:
        """How the kernel rounds inputs."""
        row_by_row = SYMMETRIC if self.inputs.symmetric else ASYMMETRIC
        return int((row_by_row if self.inputs.scale is None else GIVEN).value)

    def dequantize(self, start: int, end: int) -> Tensor:
        """`Ops.dequantize`."""
        return self.scale[start:end].unsqueeze(1) * self.codes[start:end].float()


def integer_linear(x: Tensor, packed: TritonIntegerLinear) -> Tensor:
    """`Ops.linear`.  x: [T, C] → [T, N]"""
    x = x.contiguous()
    num_rows, in_features = x.shape
    y = torch.empty((num_rows, packed.out_features), dtype=x.dtype, device=x.device)
    if not num_rows:
        return y
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    zeros = torch.empty(num_rows, dtype=torch.int32, device=x.device)
    _round_inputs[(num_rows,)](
        x,
        codes,
        scales,
        zeros,
        in_features,
        packed.inputs.scale or 0.0,
        packed.inputs.zero,
        KIND=packed.kind,
        BLOCK_C=min(ROUNDED_AT_ONCE, triton.next_power_of_2(in_features)),
    )
    tile = Tile(FEW_ROWS, 64, num_warps=4, num_stages=4) if num_rows <= FEW_ROWS else Tile(64, 128, 8, 3)
    _integer_linear[(triton.cdiv(packed.out_features, tile.block_n), triton.cdiv(num_rows, tile.block_m))](
        codes,
        scales,
        zeros,
        packed.codes,
        packed.scale,
        packed.codes if packed.sums is None else packed.sums,
        packed.codes if packed.bias is None else packed.bias,
        y,
        num_rows,
        in_features,
        packed.out_features,
        ZEROS=packed.sums is not None,
        BIAS=packed.bias is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_C=STEP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y
