"""Cuts a rank's part out of a quantised matrix, the same for all formats. Its codes and scales stay what they are."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_kernels.quantized import (
    UNIT_COLUMNS,
    AffineWeight,
    Float8Weight,
    IntegerWeight,
    MinimumWeight,
    QuantizedWeight,
    TableWeight,
)


def cut(weight: QuantizedWeight, rows: slice, columns: slice) -> QuantizedWeight:
    """The record of these rows and columns. All of them: the record itself.

    Raises ModelError if a cut would go through what shares a scale.
    """
    if (rows.stop - rows.start, columns.stop - columns.start) == weight.codes.shape:
        return weight
    codes = weight.codes[rows, columns].contiguous()
    match weight:
        case AffineWeight():
            return _cut_affine(weight, codes, rows, columns)
        case MinimumWeight():
            groups = _units(columns, weight.codes.shape[1], weight.group_size)
            return replace(
                weight,
                codes=codes,
                scale=weight.scale[groups, rows].contiguous(),
                minimum=weight.minimum[groups, rows].contiguous(),
                scale_unit=_cut_unit(weight.scale_unit, weight.codes.shape[1], rows, columns),
                minimum_unit=_cut_unit(weight.minimum_unit, weight.codes.shape[1], rows, columns),
            )
        case TableWeight():
            return _cut_table(weight, codes, rows, columns)
        case IntegerWeight():
            return replace(weight, codes=codes, scale=weight.scale[rows].contiguous())
        case Float8Weight():
            (n, c), (across_rows, across_columns) = weight.codes.shape, weight.block
            scale = weight.scale[_units(rows, n, across_rows), _units(columns, c, across_columns)].contiguous()
            return Float8Weight(codes, scale, (min(across_rows, len(codes)), min(across_columns, codes.shape[1])))


def _cut_affine(weight: AffineWeight, codes: Tensor, rows: slice, columns: slice) -> AffineWeight:
    c = weight.codes.shape[1]
    if weight.input_order is not None and codes.shape[1] < c:
        raise ModelError("a matrix in act-order cannot be divided by input features: its groups lie across them")
    groups = _units(columns, c, weight.group_size)
    scale, zero = weight.scale[groups, rows].contiguous(), weight.zero[groups, rows].contiguous()
    group_size = min(weight.group_size, codes.shape[1])
    unit = _cut_unit(weight.scale_unit, c, rows, columns)
    return replace(weight, codes=codes, scale=scale, zero=zero, group_size=group_size, scale_unit=unit)


def _cut_unit(unit: Tensor | None, c: int, rows: slice, columns: slice) -> Tensor | None:
    """What scales are multiples of; None, which only takes more room, where a cut goes through the columns of one."""
    ends_within = columns.stop % UNIT_COLUMNS and columns.stop != c
    if unit is None or columns.start % UNIT_COLUMNS or ends_within:
        return None
    return unit[columns.start // UNIT_COLUMNS : -(-columns.stop // UNIT_COLUMNS), rows].contiguous()


def _cut_table(weight: TableWeight, codes: Tensor, rows: slice, columns: slice) -> TableWeight:
    """The blocks become as short as it takes for none to lie across the edges of the part."""
    (count, width), c = codes.shape, weight.codes.shape[1]
    first = rows.start * c
    if width == c:  # blocks may span rows
        block = gcd(weight.block, first)
        starts = torch.arange(first, first + codes.numel(), block)
    else:
        block = gcd(weight.block, c, columns.start, width)
        in_rows = torch.arange(columns.start, columns.stop, block)
        starts = (first + c * torch.arange(count)[:, None] + in_rows).flatten()
    absmax = weight.absmax[starts.to(weight.absmax.device) // weight.block]
    return replace(weight, codes=codes, absmax=absmax, block=block)


def _units(part: slice, size: int, unit: int) -> slice:
    """The groups or blocks of `unit` that make up a part of a dimension."""
    if unit >= size:
        return slice(0, 1)
    if part.start % unit or (part.stop % unit and part.stop != size):
        raise ModelError(
            f"a rank's part, {part.start} to {part.stop} of {size} features, cuts through a group or block of {unit} "
            "that shares a scale: take fewer ranks"
        )
    return slice(part.start // unit, -(-part.stop // unit))
