"""Weight matrices in the layout of the compiled kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.library import Library, owned
from loraplex_kernels.quantized import (
    TABLE_SIZE,
    AffineWeight,
    Float8Weight,
    IntegerWeight,
    MinimumWeight,
    QuantizedWeight,
    TableWeight,
)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TABLE, SIGNED_BYTE, FLOAT8, INTEGERS = 0, 1, 2, 3
SYMMETRIC, ASYMMETRIC, GIVEN = 0, 1, 2  # how inputs are rounded
FLOAT8_NAN = 0x7F  # and the same with a sign


class CpuLinear:
    """A matrix that the compiled kernels hold, dense or quantised. Shares no memory with its source tensors."""

    def __init__(
        self,
        library: Library,
        handle: int | None,
        shape: torch.Size,
        dtype: torch.dtype,
        form: tuple[int, int] | None = None,
    ) -> None:
        self.out_features, self.in_features = shape
        self.dtype = dtype  # of what it is multiplied with
        self.form = form  # codec, and inputs that share a scale; None: it is dense
        self.handle = owned(self, handle, library.linear_destroy, library)
        self.nbytes: int = library.linear_bytes(self.handle)


class CpuLinearGroup:
    """The linears of several experts, by their handles."""

    def __init__(self, experts: Sequence[CpuLinear]) -> None:
        first = experts[0]
        self.out_features, self.in_features = first.out_features, first.in_features
        self.dtype = first.dtype
        # Experts whose codes are of different kinds are multiplied one after another.
        self.alike = len({expert.form for expert in experts}) == 1
        self.experts = tuple(experts)
        self._handles = np.array([expert.handle for expert in experts], dtype=np.uintp)
        self.address = self._handles.ctypes.data


def pack_dense(library: Library, weights: Sequence[Tensor], bias: Tensor | None) -> CpuLinear:
    """Pack a dense matrix into panels of 32 outputs, laid out as in linear.h."""
    weights = [weight.contiguous() for weight in weights]
    dtype, width = weights[0].dtype, weights[0].shape[1]
    bias = None if bias is None else bias.to(dtype).contiguous()
    count = len(weights)
    rows = (ctypes.c_int64 * count)(*(len(weight) for weight in weights))
    pointers = (ctypes.c_void_p * count)(*(weight.data_ptr() for weight in weights))
    handle = library.linear_create(library.context, dtype_code(dtype), width, count, rows, pointers, _pointer(bias))
    return CpuLinear(library, handle, torch.Size([sum(rows), width]), dtype)


def pack_quantized(library: Library, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> CpuLinear:
    """Pack a quantised matrix into panels of 64 outputs, laid out as in codes.h: codes of up to 4 bits take 4, others
    8.

    Raises ValueError for a float8 code that is NaN.
    """
    if isinstance(weight, IntegerWeight):
        return _pack_integers(library, weight, bias, dtype)
    form = _coded(weight)
    order = getattr(weight, "input_order", None)
    bias = None if bias is None else bias.to(dtype).contiguous()
    values = [form.scale, form.offset, form.scale_unit, form.offset_unit, None if order is None else order.long()]
    scale, offset, scale_unit, offset_unit, order = (None if each is None else each.contiguous() for each in values)
    codes, table = form.codes.contiguous(), form.table
    handle = library.quantized_create(
        library.context,
        dtype_code(dtype),
        form.codec,
        *codes.shape,
        codes.data_ptr(),
        _pointer(table),
        form.group,
        _pointer(scale),
        _pointer(offset),
        form.minima,
        *(_pointer(tensor) for tensor in (scale_unit, offset_unit, order, bias)),
    )
    return CpuLinear(library, handle, codes.shape, dtype, (form.codec, form.group))


def _pack_integers(library: Library, weight: IntegerWeight, bias: Tensor | None, dtype: torch.dtype) -> CpuLinear:
    """Pack a matrix of bytes into panels of 32 outputs, laid out as in integers.h."""
    inputs = weight.inputs
    codes, scale = weight.codes.contiguous(), weight.scale.contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    row_by_row = SYMMETRIC if inputs.symmetric else ASYMMETRIC
    handle = library.integer_create(
        library.context,
        dtype_code(dtype),
        *codes.shape,
        codes.data_ptr(),
        scale.data_ptr(),
        row_by_row if inputs.scale is None else GIVEN,
        inputs.scale or 0.0,
        inputs.zero,
        _pointer(bias),
    )
    return CpuLinear(library, handle, codes.shape, dtype, (INTEGERS, codes.shape[1]))


@dataclass(frozen=True, slots=True)
class _Coded:
    """W[n, c] = scale[g, n] · (value(codes[n, c]) + offset[g, n]) with g = c // group, or the offset outside of the
    brackets: the forms of all records here."""

    codec: int
    codes: Tensor  # uint8 [N, C]
    table: Tensor | None  # float32 [16]
    group: int
    scale: Tensor  # float32 [G, N]
    offset: Tensor | None  # float32 [G, N]
    minima: bool = False  # the offset is outside
    scale_unit: Tensor | None = None  # as in the records
    offset_unit: Tensor | None = None


def _coded(weight: AffineWeight | MinimumWeight | TableWeight | Float8Weight) -> _Coded:
    if isinstance(weight, MinimumWeight):
        return _coded_minimum(weight)
    if isinstance(weight, AffineWeight):
        return _coded_affine(weight)
    if isinstance(weight, TableWeight):
        return _coded_table(weight)
    return _coded_float8(weight)


def _coded_affine(weight: AffineWeight) -> _Coded:
    """Convert an affine record. Values count from the middle of the codes, so that symmetric weights need no offset."""
    middle = 1 << (weight.bits - 1)
    offset = middle - weight.zero if (weight.zero != middle).any() else None
    scales = (weight.group_size, weight.scale, offset, False, weight.scale_unit)
    if weight.bits > 4:
        return _Coded(SIGNED_BYTE, weight.codes - middle, None, *scales)
    return _Coded(TABLE, weight.codes, torch.arange(TABLE_SIZE, dtype=torch.float32) - middle, *scales)


def _coded_minimum(weight: MinimumWeight) -> _Coded:
    unit = None if weight.minimum_unit is None else -weight.minimum_unit
    scales = (weight.group_size, weight.scale, -weight.minimum, True, weight.scale_unit, unit)
    if weight.bits > 4:
        assert weight.bits < 8  # as signed bytes
        return _Coded(SIGNED_BYTE, weight.codes, None, *scales)
    return _Coded(TABLE, weight.codes, torch.arange(TABLE_SIZE, dtype=torch.float32), *scales)


def _coded_table(weight: TableWeight) -> _Coded:
    """Convert a table record. Blocks may end inside rows: a group is the longest run that no block boundary cuts."""
    rows, columns = weight.codes.shape
    group = math.gcd(columns, weight.block)
    starts = torch.arange(rows * columns // group) * group
    scale = weight.absmax[starts // weight.block].view(rows, columns // group).t()
    return _Coded(TABLE, weight.codes, weight.table.contiguous(), group, scale, None)


def _coded_float8(weight: Float8Weight) -> _Coded:
    codes = weight.codes.view(torch.uint8)
    if ((codes & FLOAT8_NAN) == FLOAT8_NAN).any():
        raise ValueError("a float8 weight has elements that are not numbers")
    rows, columns = weight.block
    scale = weight.scale.repeat_interleave(rows, dim=0)[: len(codes)].t()
    return _Coded(FLOAT8, codes, None, columns, scale, None)


def dtype_code(dtype: torch.dtype) -> int:
    """Raises ValueError for a dtype that the kernels do not compute in."""
    if dtype not in DTYPE_CODES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_CODES)
        raise ValueError(f"the CPU kernels compute in {names}, not in {str(dtype).removeprefix('torch.')}")
    return DTYPE_CODES[dtype]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
