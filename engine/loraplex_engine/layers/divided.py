"""Layers that several ranks divide, and what of theirs the ranks exchange.

Where ranks divide the inputs, what each returns is a part of a sum. An adapter needs no exchange of its own: its A is
divided as the input is and its B is whole, so that what B makes of a rank's x Aᵀ is a part of the same sum; so is a
gain times a part, and offsets are one rank's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_adapters.runtime.replaced import ReplacedRows
from loraplex_engine.checkpoint.model_config import FeedForward
from loraplex_engine.layers.linear import AnyLinear
from loraplex_engine.ranks.exchange import Ranks
from loraplex_kernels.ops import LoraSegments, Ops


class SummedLinear(LoRALinear):
    """A linear whose inputs are divided: the sum over the ranks."""

    def __init__(
        self,
        ops: Ops,
        linear: AnyLinear,
        num_slots: int,
        replaced: Mapping[int, tuple[ReplacedRows, ...]],
        ranks: Ranks,
    ) -> None:
        super().__init__(ops, linear, num_slots, replaced)
        self._ranks = ranks

    def __call__(self, x: Tensor, segments: LoraSegments | None) -> Tensor:
        return self._ranks.add_up(super().__call__(x, segments))


class DividedHead(LoRALinear):
    """The head, of which each rank has some rows: on the first rank all logits, on the others what they have."""

    def __init__(
        self,
        ops: Ops,
        linear: AnyLinear,
        num_slots: int,
        replaced: Mapping[int, tuple[ReplacedRows, ...]],
        ranks: Ranks,
        vocab_size: int,
    ) -> None:
        super().__init__(ops, linear, num_slots, replaced)
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._missing = ranks.shard.widest(vocab_size) - linear.out_features

    def __call__(self, x: Tensor, segments: LoraSegments | None) -> Tensor:
        part = F.pad(super().__call__(x, segments), (0, self._missing))
        return self._ranks.side_by_side(part)[:, : self._vocab_size].contiguous()


@dataclass(frozen=True, slots=True)
class SummedFeedForward:
    """A feed-forward whose inner features are divided: the sum over the ranks."""

    part: FeedForward
    ranks: Ranks

    @property
    def linears(self) -> Sequence[LoRALinear]:
        return self.part.linears

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        return self.ranks.add_up(self.part(x, lora))


@dataclass(frozen=True, slots=True)
class DividedProjectionNorm:
    """RMS norms of whole projections, of which each rank has some heads: the sums of squares are exchanged."""

    ranks: Ranks
    query: Tensor  # float32 [H·D] of the rank's heads
    key: Tensor  # float32 [K·D]
    sizes: tuple[int, int]  # of the whole projections
    eps: float

    def __call__(self, qkv: Tensor) -> Tensor:
        """Norm the queries and the keys in place.  qkv: [T, (H + 2K)·D] of the rank's heads"""
        queries, keys = len(self.query), len(self.key)
        parts = qkv[:, :queries].float(), qkv[:, queries : queries + keys].float()
        means = torch.stack([self._share(part, size) for part, size in zip(parts, self.sizes, strict=True)])
        scales = torch.rsqrt(self.ranks.add_up(means) + self.eps)
        qkv[:, :queries] = parts[0] * scales[0, :, None] * self.query
        qkv[:, queries : queries + keys] = parts[1] * scales[1, :, None] * self.key
        return qkv

    def _share(self, part: Tensor, size: int) -> Tensor:
        """What a rank adds to the mean of the squares; of heads that several ranks have, each adds a part."""
        held_by = max(1, part.shape[1] * self.ranks.shard.world // size)
        return part.square().sum(dim=1) / (size * held_by)
