"""From hidden states to queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.checkpoint.model_config import LatentAttention
from loraplex_engine.layers.divided import DividedProjectionNorm
from loraplex_engine.layers.projection_norm import HeadNorm, ProjectionNorm
from loraplex_kernels.ops import LoraSegments, Ops

LATENT_EPS = 1e-6  # of their norms, whatever that of the others is


class Projections(Protocol):
    """Queries, keys and values of one layer, with the adapters beside their linears."""

    @property
    def linears(self) -> Sequence[LoRALinear]:
        """The linears, in the order of `layout.attention_linears`."""

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        """x: [T, C] → [T, (H + 2K)·D], before the rotation.  lora: which rows of x belong to which adapter."""


@dataclass(frozen=True, slots=True)
class FusedProjections:
    """All of them in one product, and the norms that are not those of the kernels."""

    qkv: LoRALinear
    norm: ProjectionNorm | DividedProjectionNorm | HeadNorm | None

    @property
    def linears(self) -> tuple[LoRALinear]:
        return (self.qkv,)

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        qkv = self.qkv(x, lora)
        return qkv if self.norm is None else self.norm(qkv)


@dataclass(frozen=True, slots=True)
class LatentProjections:
    """Heads that are made from latents. Those of the keys share the part that turns, and values are filled up with
    zeros: the cache has them all, each of one size."""

    ops: Ops
    shape: LatentAttention
    queries: Sequence[LoRALinear]  # one, or one to a latent and one from there
    to_latent: LoRALinear
    from_latent: LoRALinear
    query_norm: Tensor | None  # float32 [query rank]
    norm: Tensor  # float32 [rank]

    @property
    def linears(self) -> tuple[LoRALinear, ...]:
        return *self.queries, self.to_latent, self.from_latent

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        shape, rows = self.shape, len(x)
        q = self._queries(x, lora).view(rows, -1, shape.still + shape.turned)
        made = self.to_latent(x, lora)
        key = made[:, shape.rank :]
        latent = self.ops.rms_norm(made[:, : shape.rank].contiguous(), self.norm, LATENT_EPS)
        kv = self.from_latent(latent, lora).view(rows, -1, shape.still + shape.values)
        # What turns comes first in each head, as the kernels have it.
        query = torch.cat((q[..., shape.still :], q[..., : shape.still]), dim=-1)
        keys = torch.cat((key[:, None].expand(-1, kv.shape[1], -1), kv[..., : shape.still]), dim=-1)
        values = torch.zeros_like(keys)
        values[..., : shape.values] = kv[..., shape.still :]
        return torch.cat((query, keys, values), dim=1).flatten(1)

    def _queries(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        first, *second = self.queries
        q = first(x, lora)
        if self.query_norm is not None:
            q = self.ops.rms_norm(q, self.query_norm, LATENT_EPS)
        return second[0](q, lora) if second else q
