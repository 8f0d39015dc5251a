"""Turns hidden states into what requests without a next token want. Each request's numbers depend on its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_adapters.runtime.classifier import ClassifierTable
from loraplex_engine.execution.arrays import PooledRows
from loraplex_engine.link.pooling import PoolingMethod
from loraplex_kernels.finite import all_finite
from loraplex_kernels.transfers import Reading


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a step's rows come to, by request id."""

    parts: Mapping[int, bytes] = field(default_factory=dict)  # as in StepResult.pooled
    not_finite: frozenset[int] = frozenset()


NOTHING_POOLED: Reading[Pooled] = Reading((), lambda here: Pooled())


def pool(hidden: Tensor, wanted: Sequence[PooledRows], heads: ClassifierTable) -> Reading[Pooled]:
    """hidden: [sum of num_rows, C], the requests' rows one after another."""
    own = torch.split(hidden, [rows.num_rows for rows in wanted])
    parts = [_part(each, rows, heads) for each, rows in zip(own, wanted, strict=True)]

    def finish(here: Iterator[Tensor]) -> Pooled:
        found = {rows.request_id: _finished(next(here), rows) for rows in wanted}
        finite = {request_id: part.numpy().tobytes() for request_id, part in found.items() if all_finite(part)}
        return Pooled(finite, frozenset(found.keys() - finite.keys()))

    return Reading(parts, finish)


def _part(hidden: Tensor, rows: PooledRows, heads: ClassifierTable) -> Tensor:
    """What the device makes of a request's rows.  hidden: [R, C]

    Logits: float32 [R, labels]; a sum: float64 [C], so that it does not show in the result where a prompt was cut into
    chunks; the last row: [C].
    """
    if rows.params.classify:
        return heads.of(rows.slot)(hidden)
    return hidden.sum(dim=0, dtype=torch.float64) if rows.params.method is PoolingMethod.MEAN else hidden[-1]


def _finished(part: Tensor, rows: PooledRows) -> Tensor:
    """Logits as they are; a vector's sum so far, float64 [C], or once all rows are here its result, float32."""
    if rows.params.classify:
        return part
    if rows.params.method is PoolingMethod.MEAN:
        if rows.sum_before:
            part = part + torch.from_numpy(np.frombuffer(rows.sum_before, dtype=np.float64).copy())
        if not rows.is_last:
            return part
        part = part / rows.num_tokens
    result = part.double()[: rows.params.dimensions]
    return (F.normalize(result, dim=0) if rows.params.normalize else result).float()
