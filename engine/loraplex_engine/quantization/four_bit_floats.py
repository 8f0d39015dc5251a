"""Floats of 4 bits (e2m1) in short blocks with a scale each: MXFP4 and NVFP4, under the names of whoever wrote them.

Two codes a byte, the first in the low half.  Sources: OCP Microscaling Formats (MX), version 1.0; NVIDIA's NVFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, check_scales, require_multiple
from loraplex_kernels.quantized import TableWeight

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the high bit of a code is the sign

# Scales that activations of 16 bits do not need.
OF_ACTIVATIONS = {name: ExpectedTensor(None, FLOATS, optional=True) for name in (".input_scale", ".input_global_scale")}


@dataclass(frozen=True, slots=True)
class Mxfp4Layout:
    """A value is its code's times 2 to the block's exponent."""

    codes: str  # what the tensors are called
    scale: str
    by_block: bool = False  # the bytes of each block are a dimension of their own

    label = "mxfp4"
    block = 32

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.scale,)

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        require_multiple(linear, "input features", linear.in_features, self.block)
        rows = *(() if linear.count is None else (linear.count,)), linear.out_features
        blocks = *rows, linear.in_features // self.block
        flat = *rows, linear.in_features // 2
        return {
            self.codes: ExpectedTensor((*blocks, self.block // 2) if self.by_block else flat, ("U8",)),
            self.scale: ExpectedTensor(blocks, ("U8", "F8_E8M0")),
            **OF_ACTIVATIONS,
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> TableWeight:
        scales = check_scales(linear, self.scale, stored[self.scale])
        return _record(linear, stored[self.codes], scales, self.block)


@dataclass(frozen=True, slots=True)
class Nvfp4Layout:
    """A value is its code's times the block's scale, a float of 8 bits, and the scale of the whole matrix."""

    codes: str  # what the tensors are called
    scale: str
    whole: str
    whole_divides: bool

    label = "nvfp4"
    block = 16

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.scale,)

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        require_multiple(linear, "input features", linear.in_features, self.block)
        rows, columns = linear.out_features, linear.in_features
        return {
            self.codes: ExpectedTensor((rows, columns // 2), ("U8",)),
            self.scale: ExpectedTensor((rows, columns // self.block), ("F8_E4M3",)),
            self.whole: ExpectedTensor(None, FLOATS),
            **OF_ACTIVATIONS,
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> TableWeight:
        whole = check_scales(linear, self.whole, stored[self.whole])
        if whole.numel() != 1:
            raise linear.error(self.whole, f"has {whole.numel()} values, and the matrix has one such scale")
        scale = check_scales(linear, self.scale, stored[self.scale], zero_allowed=True)
        scale = scale / whole if self.whole_divides else scale * whole
        return _record(linear, stored[self.codes], check_scales(linear, self.scale, scale, True), self.block)


def _record(linear: LinearShape, packed: Tensor, scales: Tensor, block: int) -> TableWeight:
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(linear.out_features, linear.in_features)
    table = torch.tensor(MAGNITUDES + tuple(-value for value in MAGNITUDES), device=packed.device)
    return TableWeight(codes, table, scales.flatten(), block)
