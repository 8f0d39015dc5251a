"""Norms of queries and keys: those of the kernels, those over all of a token's, those with weights for each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.layers.divided import DividedProjectionNorm
from loraplex_engine.ranks.exchange import Ranks
from loraplex_kernels.ops import Ops, QKNorm


@dataclass(frozen=True, slots=True)
class ProjectionNorm:
    """RMS norms of whole projections, as OLMo 2 has them: not of each head by itself."""

    ops: Ops
    query: Tensor  # float32 [H·D]
    key: Tensor  # float32 [K·D]
    eps: float

    def __call__(self, qkv: Tensor) -> Tensor:
        """Norm the queries and the keys in place.  qkv: [T, (H + 2K)·D]"""
        queries, keys = len(self.query), len(self.key)
        for part, weight in ((qkv[:, :queries], self.query), (qkv[:, queries : queries + keys], self.key)):
            part.copy_(self.ops.rms_norm(part.contiguous(), weight, self.eps))
        return qkv


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Layer norms of query and key heads, each with weights of its own (Cohere, StableLM)."""

    weight: Tensor  # float32 [H + K, D]
    eps: float

    def __call__(self, qkv: Tensor) -> Tensor:
        """Norm the queries and the keys in place.  qkv: [T, (H + 2K)·D]"""
        heads = qkv[:, : self.weight.numel()].view(len(qkv), *self.weight.shape)
        heads.copy_(F.layer_norm(heads.float(), self.weight.shape[1:], eps=self.eps) * self.weight)
        return qkv


@dataclass(frozen=True, slots=True)
class QueryKeyNorms:
    """The norms of one layer's queries and keys."""

    of_kernels: QKNorm | None = None
    of_projections: ProjectionNorm | DividedProjectionNorm | HeadNorm | None = None
    query_factor: Tensor | None = None  # [D], behind the rotation


NO_NORMS = QueryKeyNorms()


def unit_heads(config: ModelConfig, device: torch.device) -> QueryKeyNorms:
    """Norms without weights. A rotation keeps a head's length: they may come before it or behind."""
    ones = torch.ones(config.head_dim, device=device)
    return QueryKeyNorms(QKNorm(ones, ones, config.norm_eps))


def norms_of(
    config: ModelConfig, ops: Ops, query: Tensor, key: Tensor, dtype: torch.dtype, ranks: Ranks
) -> QueryKeyNorms:
    """The norms that the weights of a layer make, float32 each: those of the rank's heads."""
    if config.head_norm:
        weight = torch.cat((query, key)).view(-1, config.head_dim)
        return QueryKeyNorms(of_projections=HeadNorm(weight, config.norm_eps))
    if config.projection_norm and ranks.shard.world > 1:
        sizes = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return QueryKeyNorms(of_projections=DividedProjectionNorm(ranks, query, key, sizes, config.norm_eps))
    if config.projection_norm:
        return QueryKeyNorms(of_projections=ProjectionNorm(ops, query, key, config.norm_eps))
    if not config.qk_norm_rotated:
        return QueryKeyNorms(QKNorm(query, key, config.norm_eps))
    # A rotation keeps a head's length: so it is normed before. Keys only meet queries: their weights are put on these.
    ones = torch.ones_like(query)
    return QueryKeyNorms(QKNorm(ones, ones, config.norm_eps), query_factor=(query * key).to(dtype))
