"""Attention of a borrowed class: over the paged cache instead of the keys and values that the class hands over.

transformers' classes call what is registered under the name in their configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from loraplex_engine.borrowed.step import CurrentStep
from loraplex_kernels.ops import HeadShape, Ops

IMPLEMENTATION = "loraplex"  # what a configuration calls it
LAYER = "loraplex_attention"  # the attribute of an attention module that has its PagedAttention
PADDED_TO = 8  # dimensions of a head that is padded
POSITION_BASE = 256  # bfloat16 counts to 256 exactly: positions are written as two digits
SLOPE_PARTS = 3  # of 8 bits each: as many as float32 has
ALIBI_DIMS = 2 * SLOPE_PARTS


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a class hands over for one layer."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    alibi: bool = False  # whether scores grow with the key's position

    @property
    def cached(self) -> HeadShape:
        """What the cache keeps: keys and values of one width, which the kernels' rotation wants even."""
        width = max(self.key_dim + ALIBI_DIMS * self.alibi, self.value_dim)
        plain = width == self.key_dim == self.value_dim and width % 2 == 0
        return HeadShape(self.num_heads, self.num_kv_heads, width if plain else -(-width // PADDED_TO) * PADDED_TO)


class PagedAttention:
    """One layer's attention: stores keys and values in the cache, and attends to what the cache has."""

    def __init__(self, ops: Ops, step: CurrentStep, layer: int, shape: AttentionShape, window: int | None) -> None:
        self._ops = ops
        self._step = step
        self._layer = layer
        self._shape = shape
        self._window = window
        # The class has turned queries and keys itself: two dimensions are turned by nothing.
        self._still = torch.tensor([[[1.0], [0.0]]], device=ops.device)

    def __call__(
        self,
        query: Tensor,  # [1, H, T, D]
        key: Tensor,  # [1, K, T, D]
        value: Tensor,  # [1, K, T, E]
        attention_mask: object = None,
        scaling: float | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,  # float32 [H]: score += slope · position of the key
        s_aux: Tensor | None = None,  # [H]: sinks, as classes call them
        **_: object,
    ) -> Tensor:
        """→ [1, T, H, E]"""
        step, cached = self._step, self._shape.cached
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        assert step.batch is not None
        attention, cache = step.batch.attention, step.kv[self._layer]
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        if slopes is not None:
            q, k = with_alibi(q, k, slopes / scale, step.batch.positions)
        qkv = torch.cat([F.pad(each, (0, cached.head_dim - each.shape[-1])).flatten(1) for each in (q, k, v)], dim=1)
        sinks = None if s_aux is None else s_aux.float()
        nowhere = torch.zeros_like(step.batch.positions)
        q = self._ops.rotary_store_kv(qkv, cached, None, nowhere, self._still, cache, attention.slot_mapping)
        out = self._ops.paged_attention(q, cache, attention, scale, self._window, softcap, sinks)
        return out.view(1, len(q), cached.num_heads, cached.head_dim)[..., : self._shape.value_dim]


def with_alibi(q: Tensor, k: Tensor, slopes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with dimensions added whose products are slope · position of the key.

    q: [T, H, D], k: [T, K, D]; slopes: float32 [H].  Source: ALiBi (arXiv 2108.12409). Positions are two digits, and
    slopes sums of parts, that any dtype holds exactly.
    """
    parts, rest = [], slopes.float()
    for _ in range(SLOPE_PARTS):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    of_query = torch.stack([each for part in parts for each in (part * POSITION_BASE, part)], dim=1)  # [H, 2·parts]
    digits = torch.stack((positions // POSITION_BASE, positions % POSITION_BASE), dim=1).repeat(1, SLOPE_PARTS)
    more_q = of_query.to(q.dtype)[None].expand(len(q), -1, -1)
    more_k = digits.to(k.dtype)[:, None].expand(-1, k.shape[1], -1)
    return torch.cat((q, more_q), dim=2), torch.cat((k, more_k), dim=2)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: object, **settings: Any) -> Any:
    """The function that classes call → [1, T, H, E], and no weights.

    Masks are not read, unless by a probe: which keys a row sees, the step says.
    """
    return getattr(module, LAYER)(query, key, value, *mask, **settings), None


AttentionInterface.register(IMPLEMENTATION, attend)
