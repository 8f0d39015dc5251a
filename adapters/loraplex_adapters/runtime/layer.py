"""The application of adapters in the model: beside a linear layer, in the embedding, in a norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_adapters.runtime.replaced import NORM_WEIGHT, ReplacedRows
from loraplex_kernels.ops import LoraSegments, LoraWeights, Ops, SlotTable

EMBEDDING_SITE = "embed_tokens"
NOTHING_REPLACED: Mapping[int, tuple[ReplacedRows, ...]] = {}


class Linear(Protocol):
    """Anything that multiplies by a weight matrix: dense or quantised."""

    @property
    def in_features(self) -> int: ...  # C

    @property
    def out_features(self) -> int: ...  # N

    @property
    def bias(self) -> Tensor | None: ...  # [N]

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows of the weight, dequantised: float32 [end − start, C]. Any thread may call it; not for steps."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, N], a new tensor."""


class Site(Protocol):
    """A place in the model where adapters are applied."""

    @property
    def table(self) -> SlotTable: ...


class LoRALinear:
    """A linear layer and the adapters resident beside it.

    y[t] = gain ⊙ (linear(x[t]) + (x[t] Aᵀ) Bᵀ) + offset, with A, B, gain and offset of the adapter of row t;
    rows of the base model are not touched, and stay bit-identical to the linear alone. Where an adapter replaces
    rows of the weight, `linear` multiplies the adapter's rows by these.
    """

    def __init__(
        self,
        ops: Ops,
        linear: Linear,
        num_slots: int,
        replaced: Mapping[int, tuple[ReplacedRows, ...]] = NOTHING_REPLACED,  # by slot; others change it
    ) -> None:
        self.linear = linear
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.table = ops.lora_table(self.in_features, self.out_features, num_slots)
        self._ops = ops
        self._replaced = replaced

    def __call__(self, x: Tensor, segments: LoraSegments | None) -> Tensor:
        """x: [T, C] → [T, N]. `segments` None: no row of this step belongs to an adapter."""
        y = self.linear(x)
        if segments is not None:
            if self._replaced:
                self._replace(y, x, segments)
            self._ops.segmented_lora(y, x, segments, self.table)
        return y

    def _replace(self, y: Tensor, x: Tensor, segments: LoraSegments) -> None:
        bias = self.linear.bias
        for slot, start, end in segments.ranges:
            for part in self._replaced.get(slot, ()):
                out = F.linear(x[start:end], part.weight, None if bias is None else bias[part.rows])
                y[start:end, part.rows] = out


class EmbeddingLora:
    """One adapter at the embedding, in the layout in which rows are looked up."""

    def __init__(self, weights: LoraWeights) -> None:
        """weights: A [R, V], and B [C, R] of one slice, scale folded in."""
        (part,) = weights.slices
        assert part.rank_start == part.out_start == 0
        self.a_t = weights.a.t().contiguous()  # [V, R]
        self.b_t = part.b.t().contiguous()  # [R, C]
        self.affine = weights.affine  # float32 [2, C]

    @property
    def nbytes(self) -> int:
        return self.a_t.nbytes + self.b_t.nbytes + (0 if self.affine is None else self.affine.nbytes)

    def to(self, device: torch.device) -> EmbeddingLora:
        moved = object.__new__(EmbeddingLora)
        moved.a_t, moved.b_t = self.a_t.to(device), self.b_t.to(device)
        moved.affine = None if self.affine is None else self.affine.to(device)
        return moved

    def apply(self, x: Tensor, token_ids: Tensor) -> None:
        """x[t] = gain ⊙ (x[t] + A[:, token t]ᵀ Bᵀ) + offset, in place.  x: [T, C]"""
        y = x.float() + self.a_t[token_ids].float() @ self.b_t.float()
        if self.affine is not None:
            y = y * self.affine[0] + self.affine[1]
        x.copy_(y)


class EmbeddingTable:
    """The adapters resident at the embedding, by slot."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.adapters: dict[int, EmbeddingLora] = {}

    def put(self, slot: int, packed: object) -> None:
        assert isinstance(packed, EmbeddingLora)
        self.adapters[slot] = packed.to(self._device)

    def remove(self, slot: int) -> None:
        self.adapters.pop(slot, None)


class LoRAEmbedding:
    """The embedding of tokens, and the adapters resident beside it."""

    def __init__(self, weight: Tensor, replaced: Mapping[int, tuple[ReplacedRows, ...]] = NOTHING_REPLACED) -> None:
        self.weight = weight  # [V, C]
        self.table = EmbeddingTable(weight.device)
        self._replaced = replaced

    def __call__(self, token_ids: Tensor, segments: LoraSegments | None) -> Tensor:
        """token_ids: int64 [T] → [T, C], a new tensor."""
        x = F.embedding(token_ids, self.weight)
        if segments is not None and (self._replaced or self.table.adapters):
            for slot, start, end in segments.ranges:
                rows, tokens = x[start:end], token_ids[start:end]
                for part in self._replaced.get(slot, ()):
                    _look_up(rows, tokens, part)
                adapter = self.table.adapters.get(slot)
                if adapter is not None:
                    adapter.apply(rows, tokens)
        return x

    # What DoRA's norms are computed from: the embedding as a linear of one-hot rows, whose weight is the transpose.
    bias: Tensor | None = None

    def dequantize(self, start: int, end: int) -> Tensor:
        return self.weight[:, start:end].t().float()


def _look_up(x: Tensor, token_ids: Tensor, part: ReplacedRows) -> None:
    """Replace the embedding rows of an adapter's trained tokens by its own."""
    if isinstance(part.rows, slice):
        x.copy_(F.embedding(token_ids, part.weight))
        return
    same = token_ids[:, None] == part.rows[None, :]
    own = F.embedding(same.int().argmax(dim=1), part.weight)
    x.copy_(torch.where(same.any(dim=1, keepdim=True), own, x))


class Norm(Protocol):
    """How the models' norms are computed.  x, residual: [T, C]; weight, bias: float32 [C]"""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """→ [T, C]"""

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """residual += x in place, then the norm of the residual → [T, C]"""


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """`Ops.rms_norm`, which has no bias."""

    ops: Ops
    eps: float

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.ops.rms_norm(x, weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.ops.add_rms_norm(x, residual, weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """`Ops.layer_norm`."""

    ops: Ops
    eps: float

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.ops.layer_norm(x, weight, bias, self.eps)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.ops.add_layer_norm(x, residual, weight, bias, self.eps)


class AdaptedNorm:
    """A norm whose weight and bias adapters may replace."""

    def __init__(
        self,
        norm: Norm,
        weight: Tensor,  # float32 [C], as the checkpoint has it
        bias: Tensor | None,  # float32 [C]
        offset: float,  # what the model adds to the checkpoint's weight, and to an adapter's
        replaced: Mapping[int, tuple[ReplacedRows, ...]] = NOTHING_REPLACED,
    ) -> None:
        self.bias = bias
        self._norm = norm
        self._weight = weight + offset
        self._offset = offset
        self._replaced = replaced

    def __call__(self, x: Tensor, segments: LoraSegments | None) -> Tensor:
        """x: [T, C] → [T, C]"""
        y = self._norm(x, self._weight, self.bias)
        if self._replaced and segments is not None:
            self._replace(y, x, segments)
        return y

    def add(self, x: Tensor, residual: Tensor, segments: LoraSegments | None) -> Tensor:
        """residual += x in place, then the norm of the residual.  x, residual: [T, C] → [T, C]"""
        y = self._norm.add(x, residual, self._weight, self.bias)
        if self._replaced and segments is not None:
            self._replace(y, residual, segments)
        return y

    def _replace(self, y: Tensor, x: Tensor, segments: LoraSegments) -> None:
        for slot, start, end in segments.ranges:
            weight, bias = self._weight, self.bias
            for part in self._replaced.get(slot, ()):
                if part.rows == NORM_WEIGHT:
                    weight = part.weight + self._offset
                else:
                    bias = part.weight
            if weight is not self._weight or bias is not self.bias:
                y[start:end] = self._norm(x[start:end], weight, bias)

    def dequantize(self, start: int, end: int) -> Tensor:
        """Part of the weight, as the checkpoint has it."""
        return (self._weight - self._offset)[start:end]
