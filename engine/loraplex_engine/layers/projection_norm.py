"""A norm over all of a token's queries, and one over all of its keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.ops import Ops


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
