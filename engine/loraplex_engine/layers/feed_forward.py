"""The feed-forwards that every token goes through, and their layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.checkpoint.model_config import FusedLinear
from loraplex_kernels.ops import LoraSegments, Ops

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    """y = (activation(x Gᵀ) ⊙ x Uᵀ) Dᵀ"""

    gate_up: LoRALinear
    down: LoRALinear
    activate_and_mul: Callable[[Tensor], Tensor]  # [T, 2F] → [T, F]

    @property
    def linears(self) -> tuple[LoRALinear, LoRALinear]:
        return self.gate_up, self.down

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        return self.down(self.activate_and_mul(self.gate_up(x, lora)), lora)


@dataclass(frozen=True, slots=True)
class GatedLayout:
    """Two linears that are multiplied, one of them a gate, and one back."""

    intermediate_size: int  # F
    activation: Activation
    bias: bool = False
    stored_fused: bool = False  # gate and up are one tensor in the checkpoint

    def linears(self, hidden_size: int) -> tuple[FusedLinear, FusedLinear]:
        size = self.intermediate_size
        parts = (("mlp.gate_proj", size), ("mlp.up_proj", size))
        return (
            FusedLinear(
                "gate_up", "mlp.gate_up_proj", hidden_size, parts, self.bias, "outputs", stored_fused=self.stored_fused
            ),
            FusedLinear("down", "mlp.down_proj", size, (("mlp.down_proj", hidden_size),), self.bias, "inputs"),
        )

    def build(self, ops: Ops, linears: Sequence[LoRALinear]) -> GatedFeedForward:
        gate_up, down = linears
        return GatedFeedForward(gate_up, down, ops.silu_and_mul if self.activation == "silu" else ops.gelu_tanh_and_mul)


@dataclass(frozen=True, slots=True)
class SquaredReluFeedForward:
    """y = max(x Uᵀ, 0)² Dᵀ"""

    up: LoRALinear
    down: LoRALinear

    @property
    def linears(self) -> tuple[LoRALinear, LoRALinear]:
        return self.up, self.down

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        return self.down(torch.relu_(self.up(x, lora)).square_(), lora)


@dataclass(frozen=True, slots=True)
class SquaredReluLayout:
    """A linear, the square of what is positive, and a linear back."""

    intermediate_size: int  # F
    bias: bool = False

    def linears(self, hidden_size: int) -> tuple[FusedLinear, FusedLinear]:
        size = self.intermediate_size
        return (
            FusedLinear("up", "mlp.up_proj", hidden_size, (("mlp.up_proj", size),), self.bias, "outputs"),
            FusedLinear("down", "mlp.down_proj", size, (("mlp.down_proj", hidden_size),), self.bias, "inputs"),
        )

    def build(self, ops: Ops, linears: Sequence[LoRALinear]) -> SquaredReluFeedForward:
        return SquaredReluFeedForward(*linears)
