"""Several adapters as one: their weighted sum, computed exactly by laying their ranks side by side.

Σ w (B A) = [w₁ B₁ | w₂ B₂ | …] [A₁ ; A₂ ; …]: ranks may differ. Adding up A's and B's would make products of one
adapter's A with another's B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.pace import Rest, no_rest, resting
from loraplex_adapters.runtime.binding import BoundAdapter
from loraplex_kernels.ops import LoraSlice, LoraWeights


def combine(parts: Sequence[tuple[str, BoundAdapter, float]], rest: Rest = no_rest) -> BoundAdapter:
    """The weighted sum of adapters of one model, each with its name and weight.

    Raises AdapterRejected naming adapters that cannot be part of a sum, or sites whose values overflow.
    """
    problems = [f"{name} cannot be composed: {adapter.whole}" for name, adapter, _ in parts if adapter.whole]
    if problems:
        raise AdapterRejected(problems)
    sites = dict.fromkeys(site for _, adapter, _ in parts for site in adapter.weights)
    weights = {
        site: _sum([(adapter.weights[site], weight) for _, adapter, weight in parts if site in adapter.weights])
        for site in resting(sites, rest)
    }
    for site, summed in resting(weights.items(), rest):
        if not all(torch.isfinite(part.b).all() for part in summed.slices):
            problems.append(f"{site}: the weighted sum overflows {summed.a.dtype}")
    if problems:
        raise AdapterRejected(problems)
    ranks: dict[str, int] = {}
    for _, adapter, _ in parts:
        for module, rank in adapter.ranks.items():
            ranks[module] = ranks.get(module, 0) + rank
    return BoundAdapter(weights, ranks)


def _sum(parts: list[tuple[LoraWeights, float]]) -> LoraWeights:
    """Sum at one linear. Outputs are cut where any projection begins or ends, so that no column is written twice:
    one adapter may have the fused projection, another a part of it."""
    edges = {edge for weights, _ in parts for part in weights.slices for edge in _columns(part)}
    stacked: list[Tensor] = []
    slices: list[LoraSlice] = []
    rank = 0
    for start, end in pairwise(sorted(edges)):
        pairs = list(_between(parts, start, end))
        if pairs:
            stacked.extend(a for a, _ in pairs)
            slices.append(LoraSlice(rank, start, torch.cat([b for _, b in pairs], dim=1)))
            rank += slices[-1].b.shape[1]
    a = torch.cat(stacked) if stacked else parts[0][0].a[:0]
    return LoraWeights(a, tuple(slices), _offsets(parts))


def _columns(part: LoraSlice) -> tuple[int, int]:
    return part.out_start, part.out_start + part.b.shape[0]


def _between(parts: list[tuple[LoraWeights, float]], start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A [R, C] and the weighted B [end − start, R] of each projection that covers these columns."""
    for weights, weight in parts:
        for part in weights.slices:
            first, last = _columns(part)
            if first <= start and end <= last:
                b = part.b[start - first : end - first]
                yield (
                    weights.a[part.rank_start : part.rank_start + b.shape[1]],
                    (b.float() * weight).to(b.dtype),
                )


def _offsets(parts: list[tuple[LoraWeights, float]]) -> Tensor | None:
    """The weighted sum of the biases of B. No adapter that can be composed has gains."""
    offsets = [weights.affine[1] * weight for weights, weight in parts if weights.affine is not None]
    if not offsets:
        return None
    offset = torch.stack(offsets).sum(dim=0)
    return torch.stack((torch.ones_like(offset), offset))
