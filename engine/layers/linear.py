"""A dense linear layer."""

from __future__ import annotations

from torch import Tensor

from kernels.ops import Ops, PackedLinear


class Linear:
    """y = x Wᵀ + b, with W in the layout of the backend that multiplies by it."""

    def __init__(self, ops: Ops, packed: PackedLinear) -> None:
        self.in_features = packed.in_features  # C
        self.out_features = packed.out_features  # N
        self.nbytes = packed.nbytes
        self._ops = ops
        self._packed = packed

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, N], a new tensor."""
        return self._ops.linear(x, self._packed)
