"""The interface of a quantisation format, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_kernels.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear of the model, as the checkpoint names it."""

    path: str  # "model.layers.0.mlp.up_proj"
    out_features: int  # N
    in_features: int  # C
    has_bias: bool = False
    count: int | None = None  # experts, whose matrices are one tensor [E, N, C]; None: it is one matrix
    transposed: bool = False  # which is [E, C, N]

    @property
    def weight(self) -> str:
        """The tensor of a dense one."""
        return f"{self.path}.weight" if self.count is None else self.path

    def error(self, suffix: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}{suffix} {problem}")


class QuantSpec(Protocol):
    """One format with its parameters, as a checkpoint's configuration states them.

    Tensors go by what follows the module's path: ".qweight".
    """

    @property
    def label(self) -> str:
        """A short form for people: "gptq-4bit-g128"."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Names of tensors that only a quantised linear has; without any, a linear with a float .weight is dense."""

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        """The stored tensors of a quantised linear. Raises ModelError if its shape rules the format out."""

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> QuantizedWeight:
        """Turn stored tensors into a record. Raises ModelError naming a tensor with impossible values."""


SCALE_TYPES = (*FLOATS, "U8", "F8_E8M0")  # of block scales; the last two are e8m0: a byte that is an exponent
EXPONENT_BIAS, EXPONENT_NAN = 127, 255


def group_count(linear: LinearShape, group_size: int) -> int:
    return -(-linear.in_features // group_size)


def require_multiple(linear: LinearShape, what: str, length: int, of: int) -> None:
    """Raise ModelError if a dimension is no multiple of the packing unit."""
    if length % of:
        raise linear.error("", f"has {length} {what}, no multiple of {of}: its codes cannot be packed so")


def check_scales(linear: LinearShape, suffix: str, scales: Tensor, zero_allowed: bool = False) -> Tensor:
    """The scales in float32. Raises ModelError if one is not finite or not positive.

    zero_allowed: for maxima, which are 0 where all weights are.
    """
    scales = _powers(scales) if scales.dtype in (torch.uint8, torch.float8_e8m0fnu) else scales.float()
    if not bool(torch.isfinite(scales).all()):
        raise linear.error(suffix, "holds NaN or Inf: the checkpoint is damaged")
    lowest = float(scales.min()) if scales.numel() else 1.0
    if lowest < 0 or (lowest == 0 and not zero_allowed):
        raise linear.error(suffix, f"holds {lowest:g}, and scales are positive: the checkpoint is damaged")
    return scales


def by_group(linear: LinearShape, suffix: str, values: Tensor, groups: int) -> Tensor:
    """[N, G], of whatever shape they are stored in, or one for all of them.

    Raises ModelError if there are others.
    """
    if values.numel() not in (1, linear.out_features * groups):
        raise linear.error(suffix, f"has {values.numel()} values: one, or {groups} for each output feature")
    return values.reshape(-1, groups if values.numel() > 1 else 1).expand(linear.out_features, groups)


def _powers(exponents: Tensor) -> Tensor:
    """2 to what bytes of e8m0 stand for."""
    exponents = exponents.view(torch.uint8)
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - EXPONENT_BIAS)
    return powers.masked_fill_(exponents == EXPONENT_NAN, torch.nan)
