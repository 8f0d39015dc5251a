"""The feed-forwards that every token goes through, and their layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.checkpoint.model_config import FusedLinear
from loraplex_kernels.ops import LoraSegments, Ops, Xielu


@dataclass(frozen=True, slots=True)
class ClampedSwish:
    """(up + 1) · gate · sigmoid(α · gate), of values within a limit; gate and up lie in turn.  gpt-oss."""

    alpha: float
    limit: float

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, 2F] → [T, F]"""
        gate = x[:, ::2].float().clamp(max=self.limit)
        up = x[:, 1::2].float().clamp_(-self.limit, self.limit)
        return (up.add_(1) * gate * torch.sigmoid(gate * self.alpha)).to(x.dtype)


Activation = Literal["silu", "gelu_tanh"] | ClampedSwish
PlainActivation = Literal["gelu_tanh", "relu2", "xielu"]
XIELU: Mapping[str, tuple[int, ...]] = {
    "mlp.act_fn.alpha_p": (1,),
    "mlp.act_fn.alpha_n": (1,),
    "mlp.act_fn.beta": (),
    "mlp.act_fn.eps": (),
}


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
    in_turn: bool = False  # the rows of gate and up are one linear's, one of each in turn

    def linears(self, hidden_size: int) -> tuple[FusedLinear, FusedLinear]:
        size = self.intermediate_size
        gate, up, down, gate_up = (f"{self.module}.{name}" for name in self.names)
        parts = ((gate_up, 2 * size),) if self.in_turn else ((gate, size), (up, size))
        return (
            FusedLinear(
                f"{self.site}gate_up",
                gate_up,
                hidden_size,
                parts,
                self.bias,
                "outputs",
                unit=2 if self.in_turn else 1,
                stored_fused=self.stored_fused,
            ),
            FusedLinear(f"{self.site}down", down, size, ((down, hidden_size),), self.bias, "inputs"),
        )

    def as_stored(self, holds: Callable[[str], bool]) -> GatedLayout:
        return self

    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def build(self, ops: Ops, linears: Sequence[LoRALinear], vectors: Sequence[Tensor] = ()) -> GatedFeedForward:
        gate_up, down = linears
        return GatedFeedForward(gate_up, down, self.activate_and_mul(ops))

    def activate_and_mul(self, ops: Ops) -> Callable[[Tensor], Tensor]:
        """[T, 2F] → [T, F]"""
        if isinstance(self.activation, ClampedSwish):
            return self.activation
        return ops.silu_and_mul if self.activation == "silu" else ops.gelu_tanh_and_mul


@dataclass(frozen=True, slots=True)
class PlainFeedForward:
    """y = activation(x Uᵀ) Dᵀ"""

    up: LoRALinear
    down: LoRALinear
    activate: Callable[[Tensor], Tensor]  # [T, F] → [T, F], may overwrite

    @property
    def linears(self) -> tuple[LoRALinear, LoRALinear]:
        return self.up, self.down

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        return self.down(self.activate(self.up(x, lora)), lora)


@dataclass(frozen=True, slots=True)
class PlainLayout:
    """A linear, an activation, and a linear back."""

    intermediate_size: int  # F
    activation: PlainActivation
    bias: bool = False
    modules: tuple[str, str] = ("mlp.up_proj", "mlp.down_proj")  # the linears' paths in a layer

    def linears(self, hidden_size: int) -> tuple[FusedLinear, FusedLinear]:
        size, (up, down) = self.intermediate_size, self.modules
        return (
            FusedLinear("up", up, hidden_size, ((up, size),), self.bias, "outputs"),
            FusedLinear("down", down, size, ((down, hidden_size),), self.bias, "inputs"),
        )

    def as_stored(self, holds: Callable[[str], bool]) -> PlainLayout:
        return self

    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        return XIELU if self.activation == "xielu" else {}

    def build(self, ops: Ops, linears: Sequence[LoRALinear], vectors: Sequence[Tensor] = ()) -> PlainFeedForward:
        up, down = linears
        if self.activation == "xielu":
            return PlainFeedForward(up, down, partial(ops.xielu, shape=_xielu(vectors)))
        return PlainFeedForward(up, down, ops.gelu_tanh if self.activation == "gelu_tanh" else _squared_relu)


def _squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)², in place."""
    return torch.relu_(x).square_()


def _xielu(vectors: Sequence[Tensor]) -> Xielu:
    """The two slopes are stored such that any number is a positive one, the second on top of beta."""
    positive, negative, beta, eps = (vector.cpu() for vector in vectors)
    return Xielu(F.softplus(positive).item(), (beta + F.softplus(negative)).item(), beta.item(), eps.item())
