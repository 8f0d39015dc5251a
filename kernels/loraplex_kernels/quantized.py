"""Quantised weight matrices in canonical form: every checkpoint format is unpacked into one of five records.

A loader makes records, a backend's `Ops.pack_quantized` lays them out for its kernels, and `dequantize` defines the
value of each. Codes take a byte each here, and live only until they are packed.

Letters: N output features, C input features, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
TABLE_SIZE = 16
UNIT_COLUMNS = 256  # that share a unit of their scales
MAX_INTEGER_INPUTS = 1 << 16  # whose products' sum is within 32 bits


class _Record:
    __slots__ = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors, at one byte per code."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


@dataclass(frozen=True, slots=True)
class AffineWeight(_Record):
    """W[n, c] = scale[g, n] · (codes[n, c] − zero[g, n]) with g = c // group_size.  GPTQ, AWQ, integer formats.

    With `input_order` (GPTQ's act-order, its columns sorted by group) column j of `codes` is input feature
    input_order[j]:  y[t] = Σ_j W[:, j] · x[t, input_order[j]].  A row of x is never reordered outside the base product:
    an adapter reads x in its own order.

    Scales are 16-bit floats in nearly all files, and zeros whole numbers below 2^bits in all but AWQ's gemv_fast.
    """

    codes: Tensor  # uint8 [N, C], each below 2^bits
    bits: int  # one of AFFINE_BITS
    scale: Tensor  # float32 [G, N]
    zero: Tensor  # float32 [G, N], in units of codes
    group_size: int  # columns that share a scale; the last group may be shorter: G = ceil(C / group_size)
    input_order: Tensor | None = None  # int64 [C], a permutation
    # float32 [ceil(C / UNIT_COLUMNS), N]: float16 numbers that scales are whole multiples of, -128 to 127
    scale_unit: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.bits in AFFINE_BITS
        assert self.scale.shape == self.zero.shape == (-(-columns // self.group_size), rows)
        assert self.codes.dtype == torch.uint8
        assert self.scale.dtype == self.zero.dtype == torch.float32


@dataclass(frozen=True, slots=True)
class MinimumWeight(_Record):
    """W[n, c] = scale[g, n] · codes[n, c] − minimum[g, n] with g = c // group_size.  GGUF's types with a minimum.

    Not an affine record: a zero point in units of codes would have to be rounded, and a scale may be 0 here.
    """

    codes: Tensor  # uint8 [N, C], each below 2^bits
    bits: int  # one of AFFINE_BITS
    scale: Tensor  # float32 [G, N]
    minimum: Tensor  # float32 [G, N]
    group_size: int  # columns that share a scale; the last group may be shorter
    scale_unit: Tensor | None = None  # as in AffineWeight
    minimum_unit: Tensor | None = None  # the same of the minima

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.bits in AFFINE_BITS
        assert self.scale.shape == self.minimum.shape == (-(-columns // self.group_size), rows)
        assert self.codes.dtype == torch.uint8
        assert self.scale.dtype == self.minimum.dtype == torch.float32

    def as_affine(self) -> AffineWeight:
        """The same but for the zero points, which are rounded to float32: for kernels that know no minima."""
        flat = self.scale == 0  # all weights of the group are its minimum: code 0, whatever it is
        scale = torch.where(flat, 1.0, self.scale)
        codes = self.codes.masked_fill(_spread(flat, self), 0) if bool(flat.any()) else self.codes
        return AffineWeight(codes, self.bits, scale, self.minimum / scale, self.group_size)


@dataclass(frozen=True, slots=True)
class TableWeight(_Record):
    """W = table[codes] · absmax[i // block] with i = n·C + c.  bitsandbytes' nf4 and fp4 (QLoRA, arXiv 2305.14314).

    A block may span rows where C is no multiple of it.
    """

    codes: Tensor  # uint8 [N, C], each below 16
    table: Tensor  # float32 [16]
    absmax: Tensor  # float32 [ceil(N·C / block)]
    block: int  # consecutive elements that share an absmax

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8
        assert self.codes.dim() == 2
        assert self.table.shape == (TABLE_SIZE,)
        assert self.absmax.shape == (-(-self.codes.numel() // self.block),)
        assert self.table.dtype == self.absmax.dtype == torch.float32


@dataclass(frozen=True, slots=True)
class Float8Weight(_Record):
    """W[n, c] = codes[n, c] · scale[n // rows, c // columns] with block = (rows, columns), cut at the edges.  FP8.

    One scale per output feature is block (1, C).
    """

    codes: Tensor  # float8_e4m3fn [N, C]
    scale: Tensor  # float32 [ceil(N / rows), ceil(C / columns)]
    block: tuple[int, int]

    def __post_init__(self) -> None:
        (n, c), (rows, columns) = self.codes.shape, self.block
        assert self.codes.dtype == torch.float8_e4m3fn
        assert self.scale.shape == (-(-n // rows), -(-c // columns))
        assert self.scale.dtype == torch.float32


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How inputs x become integers q = round(x / s + z) from -128 to 127; ties go to the even one.

    Each row has its own s: max|x| / 127, with z = 0; or, asymmetric, (high - low) / 255, with z = round(-128 - low / s)
    and 0 from low to high. Or all rows have the same, from the checkpoint.
    """

    symmetric: bool = True
    scale: float | None = None  # s of all rows; None: each has its own
    zero: int = 0  # z beside it


@dataclass(frozen=True, slots=True)
class IntegerWeight(_Record):
    """W[n, c] = scale[n] · codes[n, c], multiplied by inputs that are rounded, too: sums are of integers, and exact.

    y[t, n] = scale[n] · (Σ_c (q[t, c] − z[t]) · codes[n, c]) · s[t].  Source: SmoothQuant (arXiv 2211.10438).
    """

    codes: Tensor  # int8 [N, C], C at most MAX_INTEGER_INPUTS
    scale: Tensor  # float32 [N]
    inputs: InputRounding

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.codes.dtype == torch.int8
        assert columns <= MAX_INTEGER_INPUTS
        assert self.scale.shape == (rows,)
        assert self.scale.dtype == torch.float32


QuantizedWeight = AffineWeight | MinimumWeight | TableWeight | Float8Weight | IntegerWeight


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The matrix that a record stands for, float32 [N, C], columns in the order of the input features."""
    columns = weight.codes.shape[1]
    if isinstance(weight, TableWeight):
        values = weight.table[weight.codes.flatten().int()]
        scale = weight.absmax.repeat_interleave(weight.block)[: values.numel()]
        return (values * scale).view_as(weight.codes)
    if isinstance(weight, Float8Weight):
        rows, across = weight.block
        by_row = weight.scale.repeat_interleave(rows, dim=0)[: len(weight.codes)]
        return weight.codes.float() * by_row.repeat_interleave(across, dim=1)[:, :columns]
    if isinstance(weight, IntegerWeight):
        return weight.scale.unsqueeze(1) * weight.codes.float()
    if isinstance(weight, MinimumWeight):
        return _spread(weight.scale, weight) * weight.codes.float() - _spread(weight.minimum, weight)
    dense = _spread(weight.scale, weight) * (weight.codes.float() - _spread(weight.zero, weight))
    if weight.input_order is None:
        return dense
    restored = torch.empty_like(dense)
    restored[:, weight.input_order] = dense
    return restored


def _spread(per_group: Tensor, weight: AffineWeight | MinimumWeight) -> Tensor:
    """[G, N] → [N, C]"""
    return per_group.t().repeat_interleave(weight.group_size, dim=1)[:, : weight.codes.shape[1]]


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One record with the rows of all, one after another; None: they differ in a property that a record has once.

    Such properties are kind, bits, group or block size, table, order of input features, and how these are rounded.
    Blocks that span rows also give None where a part's rows are no whole number of blocks.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(type(weight) is not type(first) for weight in weights):
        return None
    codes = torch.cat([weight.codes for weight in weights])
    if isinstance(first, AffineWeight):
        parts = [weight for weight in weights if isinstance(weight, AffineWeight)]
        if any(not _alike(first, part) for part in parts):
            return None
        return replace(first, codes=codes, **_side_by_side(parts, ("scale", "zero", "scale_unit")))
    if isinstance(first, MinimumWeight):
        minima = [weight for weight in weights if isinstance(weight, MinimumWeight)]
        if any((part.bits, part.group_size) != (first.bits, first.group_size) for part in minima):
            return None
        names = ("scale", "minimum", "scale_unit", "minimum_unit")
        return replace(first, codes=codes, **_side_by_side(minima, names))
    if isinstance(first, TableWeight):
        tables = [weight for weight in weights if isinstance(weight, TableWeight)]
        if any(part.block != first.block or not torch.equal(part.table, first.table) for part in tables):
            return None
        if any(part.codes.numel() % first.block for part in tables[:-1]):
            return None
        return replace(first, codes=codes, absmax=torch.cat([part.absmax for part in tables]))
    if isinstance(first, IntegerWeight):
        integers = [weight for weight in weights if isinstance(weight, IntegerWeight)]
        if any(part.inputs != first.inputs for part in integers):
            return None
        return replace(first, codes=codes, scale=torch.cat([part.scale for part in integers]))
    blocks = [weight for weight in weights if isinstance(weight, Float8Weight)]
    if any(part.block != first.block for part in blocks):
        return None
    if any(len(part.codes) % first.block[0] for part in blocks[:-1]):
        return None
    return replace(first, codes=codes, scale=torch.cat([part.scale for part in blocks]))


def _side_by_side(parts: Sequence[AffineWeight | MinimumWeight], names: Sequence[str]) -> dict[str, Any]:
    """The tensors of these names, one part's columns after another's; None for those that some part lacks."""
    found = {name: [getattr(part, name) for part in parts] for name in names}
    return {
        name: None if any(tensor is None for tensor in tensors) else torch.cat(tensors, dim=1)
        for name, tensors in found.items()
    }


def _alike(one: AffineWeight, other: AffineWeight) -> bool:
    if (one.bits, one.group_size) != (other.bits, other.group_size):
        return False
    if one.input_order is None or other.input_order is None:
        return one.input_order is other.input_order
    return torch.equal(one.input_order, other.input_order)
