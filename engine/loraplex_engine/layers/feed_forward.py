"""The feed-forwards that every token goes through, and their layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


class GatedNames(NamedTuple):
    """What the linears of a gated feed-forward are called in its module."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"  # had the checkpoint fused them


USUAL_NAMES = GatedNames()


@dataclass(frozen=True, slots=True)
class GatedLayout:
    """Two linears that are multiplied, one of them a gate, and one back."""

    intermediate_size: int  # F
    activation: Activation
    bias: bool = False
    stored_fused: bool = False  # gate and up are one tensor in the checkpoint
    module: str = "mlp"  # inside a layer
    names: GatedNames = USUAL_NAMES
    site: str = ""  # in front of the names of its sites, where a layer has several

    def linears(self, hidden_size: int) -> tuple[FusedLinear, FusedLinear]:
        size = self.intermediate_size
        gate, up, down, gate_up = (f"{self.module}.{name}" for name in self.names)
        parts = ((gate, size), (up, size))
        return (
            FusedLinear(
                f"{self.site}gate_up", gate_up, hidden_size, parts, self.bias, "outputs", stored_fused=self.stored_fused
            ),
            FusedLinear(f"{self.site}down", down, size, ((down, hidden_size),), self.bias, "inputs"),
        )

    def as_stored(self, holds: Callable[[str], bool]) -> GatedLayout:
        return self

    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def build(self, ops: Ops, linears: Sequence[LoRALinear], vectors: Sequence[Tensor] = ()) -> GatedFeedForward:
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

    def as_stored(self, holds: Callable[[str], bool]) -> SquaredReluLayout:
        return self

    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def build(self, ops: Ops, linears: Sequence[LoRALinear], vectors: Sequence[Tensor] = ()) -> SquaredReluFeedForward:
        return SquaredReluFeedForward(*linears)
