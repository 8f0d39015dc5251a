"""Factors of queries behind the rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError, QueryGrowth
from loraplex_kernels.finite import all_finite


@dataclass(frozen=True, slots=True)
class QueryScale:
    """What queries are multiplied by: a factor for each dimension of a head, one for each position, or both."""

    by_dimension: Tensor | None  # [D]
    by_position: Tensor | None  # [max positions]

    def __call__(self, q: Tensor, positions: Tensor) -> None:
        """Scale queries in place.  q: [T, H, D], positions: int64 [T]"""
        if self.by_dimension is not None:
            q *= self.by_dimension
        if self.by_position is not None:
            q.copy_(q * self.by_position[positions, None, None])


def growth_table(growth: QueryGrowth, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 + β · ln(1 + ⌊(position + ahead) / original⌋) → [num_positions]: a table, so that no factor depends on its
    batch."""
    lengths = (
        torch.arange(growth.ahead, growth.ahead + num_positions, dtype=torch.float32)
        .div_(growth.original_max_positions)
        .floor_()
    )
    table = 1 + growth.beta * torch.log1p(lengths)
    rounded = table.to(dtype)
    if not all_finite(rounded):
        raise ModelError(
            f"{growth}: its factors are not finite numbers in {dtype}; correct llama_4_scaling_beta, or attn_scale"
        )
    return (rounded if growth.rounded else table).to(device)
