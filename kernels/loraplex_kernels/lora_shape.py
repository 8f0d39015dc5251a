"""The check of an adapter at one linear, before a backend packs it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from loraplex_kernels.ops import LoraWeights


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The shape of an adapter at one linear, checked alike for every backend."""

    rank: int  # sum of R
    in_features: int
    columns: tuple[tuple[int, int], ...]  # first and end of those that each projection writes, ascending
    affine: tuple[int, ...] | None  # the shape of gain and offset, if there are any

    @classmethod
    def of(cls, weights: LoraWeights) -> LoraShape:
        """The shape of these weights.

        Raises ValueError if a projection reads ranks that A lacks, or two write one column.
        """
        rank, in_features = weights.a.shape
        for part in weights.slices:
            end = part.rank_start + part.b.shape[1]
            if part.rank_start < 0 or end > rank:
                raise ValueError(f"LoRA B reads ranks {part.rank_start} to {end}, A has {rank}")
        columns = sorted((part.out_start, part.out_start + part.b.shape[0]) for part in weights.slices)
        for (_, end), (start, _) in pairwise(columns):
            if start < end:
                raise ValueError(f"two LoRA projections write column {start}: concatenate their ranks instead")
        return cls(rank, in_features, tuple(columns), None if weights.affine is None else tuple(weights.affine.shape))

    def check_fits(self, in_features: int, out_features: int) -> None:
        """Raise ValueError unless the linear has the input features and columns that the adapter uses."""
        if self.in_features != in_features:
            raise ValueError(
                f"LoRA A is [{self.rank}, {self.in_features}] but the linear has {in_features} input features"
            )
        for start, end in self.columns:
            if start < 0 or end > out_features:
                raise ValueError(f"LoRA B writes columns {start} to {end}, the linear has {out_features}")
        if self.affine not in (None, (2, out_features)):
            raise ValueError(f"gain and offset are {list(self.affine or ())}, the linear needs [2, {out_features}]")
