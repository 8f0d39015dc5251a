"""Weights of int8 whose inputs are rounded to int8 as well (W8A8), as several formats have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, check_scales
from loraplex_kernels.integers import HIGHEST, LOWEST
from loraplex_kernels.quantized import MAX_INTEGER_INPUTS, InputRounding, IntegerWeight

INPUT_SCALE, INPUT_ZERO = ".input_scale", ".input_zero_point"


@dataclass(frozen=True, slots=True)
class IntegerInputs:
    """What a file states of the rounding of inputs."""

    symmetric: bool = True
    static: bool = False  # the file brings one scale for all rows; else each has its own

    def tensors(self) -> dict[str, ExpectedTensor]:
        zero = ExpectedTensor(None, ("I8", "I32"), optional=self.symmetric or not self.static)
        return {INPUT_SCALE: ExpectedTensor(None, FLOATS, optional=not self.static), INPUT_ZERO: zero}

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> InputRounding:
        if not self.static:
            return InputRounding(self.symmetric)
        scale = check_scales(linear, INPUT_SCALE, stored[INPUT_SCALE])
        zero = int(_only(linear, INPUT_ZERO, stored[INPUT_ZERO])) if INPUT_ZERO in stored else 0
        if self.symmetric and zero:
            raise linear.error(INPUT_ZERO, f"is {zero}, though config.json says symmetric")
        if not LOWEST <= zero <= HIGHEST:
            raise linear.error(INPUT_ZERO, f"is {zero}, and codes are from {LOWEST} to {HIGHEST}")
        return InputRounding(self.symmetric, float(_only(linear, INPUT_SCALE, scale)), zero)


def integer_weight(
    linear: LinearShape, suffix: str, codes: Tensor, scale: Tensor, inputs: InputRounding
) -> IntegerWeight:
    """A weight with its scales, of which there may be one for all output features."""
    if linear.in_features > MAX_INTEGER_INPUTS:
        raise linear.error(
            "", f"has {linear.in_features} input features; 32 bits hold the sums of {MAX_INTEGER_INPUTS} products"
        )
    scale = check_scales(linear, suffix, scale).flatten()
    if len(scale) not in (1, len(codes)):
        raise linear.error(suffix, f"has {len(scale)} values: one, or {len(codes)}, one for each output feature")
    return IntegerWeight(codes, scale.expand(len(codes)).contiguous(), inputs)


def _only(linear: LinearShape, suffix: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise linear.error(suffix, f"has {tensor.numel()} values, and needs one for all inputs")
    return tensor.item()
