"""Whether an adapter leaves the cache as the base model fills it, proved from its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from loraplex_adapters.runtime.binding import BoundAdapter
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_kernels.ops import LoraWeights


def leaves_cache(bound: BoundAdapter, targets: Mapping[str, LoraTarget]) -> bool:
    """Whether every key and value is what it would be without the adapter.

    So it is if all outputs that its matrices change lie behind the last keys and values: those of the head, of the last
    layer's queries, attention and feed-forward. False: that is not proved, as by a rank that sees a part of them.
    """
    if bound.replaced is not None or any(_is_seen_in_part(target) for target in targets.values()):
        return False
    behind: dict[str, list[slice]] = {}
    for target in targets.values():
        if not target.reaches_cache and target.site in bound.weights:
            behind.setdefault(target.site, []).append(target.columns)
    return all(
        _lies_in(columns, behind.get(site, []))
        for site, weights in bound.weights.items()
        for columns in _changed(weights)
    )


def _is_seen_in_part(target: LoraTarget) -> bool:
    return target.is_elsewhere or (target.share is not None and target.share.is_part)


def _changed(weights: LoraWeights) -> Iterator[Tensor]:
    """The columns of a linear's output that an adapter may change, of each of its parts: int64 [n]

    Zeros in B do not spare a column: what A makes of some input may be infinite, and zero times that is NaN.
    """
    if weights.affine is not None:
        gain, offset = weights.affine
        yield ((gain != 1) | (offset != 0)).nonzero().flatten()
    for part in weights.slices:
        width, rank = part.b.shape
        if weights.a[part.rank_start : part.rank_start + rank].any():
            yield torch.arange(part.out_start, part.out_start + width)


def _lies_in(columns: Tensor, places: Sequence[slice]) -> bool:
    inside = torch.zeros(len(columns), dtype=torch.bool)
    for place in places:
        inside |= (columns >= place.start) & (columns < place.stop)
    return bool(inside.all())
