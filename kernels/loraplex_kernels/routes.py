"""The rows of a mixture of experts: one for each expert of each token, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.ops import LoraSegments


@dataclass(frozen=True, slots=True)
class Routes:
    """R = T·k rows, those of one expert together, in the order of the tokens."""

    tokens: Tensor  # int64 [R]: the token of each row
    rows: Tensor  # int64 [T, k]: the row of each token's choices
    starts: Tensor  # int64 [E + 1]: rows [starts[e], starts[e + 1]) are expert e's
    lora: LoraSegments | None  # which rows belong to which adapter: slot s at expert e is slot s·E + e


def route(chosen: Tensor, num_experts: int, lora: LoraSegments | None) -> Routes:
    """Sort the choices of all tokens by expert.  chosen: int64 [T, k]

    lora: which tokens belong to which adapter.
    """
    order = chosen.flatten().argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    tokens = order // chosen.shape[1]
    counts = torch.bincount(chosen.flatten(), minlength=num_experts)
    starts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(counts, 0, out=starts[1:])
    segments = None if lora is None else _segments(chosen, tokens, starts, lora)
    return Routes(tokens, rows.view_as(chosen), starts, segments)


def _segments(chosen: Tensor, tokens: Tensor, starts: Tensor, lora: LoraSegments) -> LoraSegments:
    """The rows of each adapter at each expert: as the tokens of an adapter lie together, so do their rows there."""
    of_token = np.full(len(chosen), -1)
    for index, (_, first, end) in enumerate(lora.ranges):
        of_token[first:end] = index
    of_row = of_token[tokens.cpu().numpy()]
    num_rows = np.diff(starts.cpu().numpy())
    experts = np.repeat(np.arange(len(num_rows)), num_rows)
    edges = np.flatnonzero((np.diff(experts, prepend=-1) != 0) | (np.diff(of_row, prepend=-2) != 0))
    ends = np.append(edges[1:], len(of_row))
    adapted = of_row[edges] >= 0
    first, end = edges[adapted], ends[adapted]
    slots = np.array([slot for slot, _, _ in lora.ranges])[of_row[first]] * len(num_rows) + experts[first]
    columns = torch.from_numpy(np.stack((slots, first, end)).astype(np.int32)).to(chosen.device)
    ranges = tuple(zip(slots.tolist(), first.tolist(), end.tolist(), strict=True))
    return LoraSegments(ranges, columns[0], columns[1], columns[2])
