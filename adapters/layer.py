"""The one place where LoRA meets the model: beside a linear layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kernels.ops import LoraSegments, Ops


class Linear(Protocol):
    """Anything that multiplies by a weight matrix: dense or quantised."""

    @property
    def in_features(self) -> int: ...  # C

    @property
    def out_features(self) -> int: ...  # N

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, N], a new tensor."""


class LoRALinear:
    """A linear layer and the adapters resident beside it.

    y[t] = linear(x[t]) + (x[t] Aᵀ) Bᵀ, A and B those of the adapter that row t belongs to; nothing is added to rows of
    the base model, which stay bit-identical to the linear alone.
    """

    def __init__(self, ops: Ops, linear: Linear, num_slots: int) -> None:
        self.linear = linear
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.table = ops.lora_table(self.in_features, self.out_features, num_slots)
        self._ops = ops

    def __call__(self, x: Tensor, segments: LoraSegments | None) -> Tensor:
        """x: [T, C] → [T, N]. `segments` None: no row of this step belongs to an adapter."""
        y = self.linear(x)
        if segments is not None:
            self._ops.segmented_lora(y, x, segments, self.table)
        return y
