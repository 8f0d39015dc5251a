"""Linear layers: one packed matrix, dense or quantised, or several whose outputs lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.ops import Ops, PackedLinear


class AnyLinear(Protocol):
    """y = x Wᵀ + b."""

    @property
    def in_features(self) -> int: ...  # C

    @property
    def out_features(self) -> int: ...  # N

    @property
    def nbytes(self) -> int: ...

    @property
    def bias(self) -> Tensor | None: ...  # [N], kept for adapters that change it

    @property
    def packed(self) -> tuple[PackedLinear, ...]: ...  # whose outputs lie side by side

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, N], a new tensor."""

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows start … end of W: float32 [end - start, C]."""


class Linear:
    """y = x Wᵀ + b, with W in the layout of the backend that multiplies by it."""

    def __init__(self, ops: Ops, packed: PackedLinear, bias: Tensor | None = None) -> None:
        """bias: [N], packed with the weight."""
        self.in_features = packed.in_features  # C
        self.out_features = packed.out_features  # N
        self.nbytes = packed.nbytes
        self.bias = bias  # [N]
        self._ops = ops
        self.packed = (packed,)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, N], a new tensor."""
        return self._ops.linear(x, *self.packed)

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows start … end of W: float32 [end - start, C]."""
        return self._ops.dequantize(*self.packed, start, end)


class SideBySide:
    """Projections of one input that no single matrix holds, because they are quantised differently or not all are."""

    def __init__(self, parts: Sequence[Linear], bias: Tensor | None = None) -> None:
        """bias: the biases of all parts, [N]."""
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)
        self.bias = bias  # [N]
        self.packed = tuple(packed for part in parts for packed in part.packed)
        self._parts = tuple(parts)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, N], a new tensor."""
        return torch.cat([part(x) for part in self._parts], dim=1)

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows start … end of W: float32 [end - start, C]."""
        found, first = [], 0
        for part in self._parts:
            last = first + part.out_features
            if start < last and first < end:
                found.append(part.dequantize(max(start, first) - first, min(end, last) - first))
            first = last
        return torch.cat(found)
