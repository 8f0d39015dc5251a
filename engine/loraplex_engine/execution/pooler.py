"""Turns hidden states into what requests without a next token want. Each request's numbers depend on its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_adapters.runtime.classifier import ClassifierHead
from loraplex_engine.execution.arrays import PooledRows
from loraplex_engine.link.pooling import PoolingMethod
from loraplex_kernels.finite import all_finite


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a step's rows come to, by request id."""

    parts: Mapping[int, bytes] = field(default_factory=dict)  # as in StepResult.pooled
    not_finite: frozenset[int] = frozenset()


NOTHING_POOLED = Pooled()


def pool(hidden: Tensor, wanted: Sequence[PooledRows], heads: Mapping[int, ClassifierHead]) -> Pooled:
    """hidden: [sum of num_rows, C], the requests' rows one after another. heads: by slot."""
    parts: dict[int, bytes] = {}
    not_finite: set[int] = set()
    start = 0
    for rows in wanted:
        own = hidden[start : start + rows.num_rows]
        part = _logits(own, rows, heads) if rows.params.classify else _vector(own, rows)
        start += rows.num_rows
        if all_finite(part):
            parts[rows.request_id] = part.numpy().tobytes()
        else:
            not_finite.add(rows.request_id)
    return Pooled(parts, frozenset(not_finite))


def _logits(hidden: Tensor, rows: PooledRows, heads: Mapping[int, ClassifierHead]) -> Tensor:
    """hidden: [R, C] of one request → float32 [R, labels]"""
    assert rows.slot is not None, "checked when the request came"
    return heads[rows.slot](hidden).cpu()


def _vector(hidden: Tensor, rows: PooledRows) -> Tensor:
    """hidden: [R, C] of one request → its sum so far, float64 [C], or once all rows are here its result, float32."""
    if rows.params.method is PoolingMethod.MEAN:
        # In float64, so that it does not show in the result where a prompt was cut into chunks.
        total = hidden.sum(dim=0, dtype=torch.float64).cpu()
        if rows.sum_before:
            total += torch.from_numpy(np.frombuffer(rows.sum_before, dtype=np.float64).copy())
        if not rows.is_last:
            return total
        result = total / rows.num_tokens
    else:
        result = hidden[-1].cpu().double()
    result = result[: rows.params.dimensions]
    return (F.normalize(result, dim=0) if rows.params.normalize else result).float()
