"""MXFP4 as gpt-oss has it: the matrices of all experts, in blocks of 32 floats of 4 bits with an exponent of their own.

Source: OCP Microscaling Formats (MX), version 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, require_multiple
from loraplex_kernels.quantized import TableWeight

BLOCK = 32
BIAS, NAN = 127, 255  # of an exponent
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the high bit of a code is the sign


@dataclass(frozen=True, slots=True)
class Mxfp4Spec:
    """Two codes a byte, the first in the low half; a value is its code's times 2 to the block's exponent."""

    label = "mxfp4"
    markers = ("_blocks", "_scales")

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        require_multiple(linear, "input features", linear.in_features, BLOCK)
        shape = *(() if linear.count is None else (linear.count,)), linear.out_features, linear.in_features // BLOCK
        return {
            "_blocks": ExpectedTensor((*shape, BLOCK // 2), ("U8",)),
            "_scales": ExpectedTensor(shape, ("U8",)),
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> TableWeight:
        blocks, exponents = stored["_blocks"], stored["_scales"]
        if bool((exponents == NAN).any()):
            raise linear.error("_scales", "holds NaN: the checkpoint is damaged")
        codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).view(linear.out_features, linear.in_features)
        table = torch.tensor(MAGNITUDES + tuple(-value for value in MAGNITUDES), device=blocks.device)
        scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - BIAS).flatten()
        return TableWeight(codes, table, scales, BLOCK)


def parse(fields: ConfigFields) -> Mxfp4Spec:
    return Mxfp4Spec()
