"""Eight-bit numbers by integer arithmetic, which every GPU has and the interpreter computes alike.

Tensors of codes are passed to kernels as int8, whatever they stand for.
"""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What the elements of a tensor are.
PLAIN = tl.constexpr(0)  # what they say
INT8 = tl.constexpr(1)
FLOAT8 = tl.constexpr(2)  # e4m3: sign, four bits of exponent less 7, three of mantissa; no infinity

_CODINGS = {torch.int8: INT8, torch.float8_e4m3fn: FLOAT8}


def coding_of(dtype: torch.dtype) -> int:
    return int(_CODINGS.get(dtype, PLAIN).value)


def as_codes(tensor: Tensor) -> Tensor:
    """A view of the same memory as int8, the type that kernels take."""
    return tensor.view(torch.int8) if tensor.dtype in _CODINGS else tensor


@triton.jit
def decode(codes: tl.tensor, CODING: tl.constexpr) -> tl.tensor:
    """Decode int8 codes to float32."""
    if CODING == FLOAT8:
        # Sign, exponent and mantissa to where float32 has them; its exponent counts from 127, not from 7.
        bits = (codes.to(tl.int32) << 20) & -0x78100000
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return codes.to(tl.float32)


@triton.jit
def encode(x: tl.tensor, CODING: tl.constexpr) -> tl.tensor:
    """Encode float32 values, within the coding's range, to the nearest codes; ties go to the even code."""
    if CODING == FLOAT8:
        bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)  # 2^-120
        rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (rounded | sign).to(tl.int8)
    # Beside 1.5 · 2^23 a float32 has no room for a fraction.
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)
