"""Products of integers: inputs are rounded row by row, and multiplied by weights that are integers already.

In plain torch, on any device: the definition of correct results, to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.quantized import InputRounding, IntegerWeight

LOWEST, HIGHEST = -128, 127


class RoundedInputs(NamedTuple):
    """x[t] ≈ scale[t] · (codes[t] − zero[t])"""

    codes: Tensor  # float32 [T, C], whole numbers
    scale: Tensor  # float32 [T, 1]; NaN: an input of the row is not finite
    zero: Tensor  # float32 [T, 1], whole numbers


def round_inputs(x: Tensor, rounding: InputRounding) -> RoundedInputs:
    """Round x [T, C] as `rounding` says. A row whose scale is 0 becomes zeros."""
    wide = x.float()
    low, high = wide.amin(1, keepdim=True).clamp(max=0), wide.amax(1, keepdim=True).clamp(min=0)
    zero = torch.zeros_like(low)
    if rounding.scale is not None:
        scale, zero = torch.full_like(low, rounding.scale), torch.full_like(low, rounding.zero)
    elif rounding.symmetric:
        scale = torch.maximum(-low, high) / HIGHEST
    else:
        scale = (high - low) / (HIGHEST - LOWEST)
        zero = (LOWEST - low / scale).clamp(LOWEST, HIGHEST).round()
    codes = (wide / scale + zero).clamp(LOWEST, HIGHEST).round()
    nothing = scale == 0
    codes, zero = codes.masked_fill(nothing, 0), zero.masked_fill(nothing, 0)
    return RoundedInputs(codes, scale.masked_fill(~wide.isfinite().all(1, keepdim=True), torch.nan), zero)


def integer_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """`Ops.linear` of such a weight: after the sum, float32 is rounded to once for each factor and for the bias."""
    inputs = round_inputs(x, weight.inputs)
    sums = (inputs.codes - inputs.zero).double() @ weight.codes.double().t()  # far below 2^53, so exact on any device
    y = sums.float() * weight.scale * inputs.scale
    return (y if bias is None else y + bias.float()).to(x.dtype)
