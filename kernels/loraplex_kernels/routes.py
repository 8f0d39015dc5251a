"""`Ops.route` in plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.ops import LoraSegments, Routes, Routing


def route(logits: Tensor, routing: Routing, correction: Tensor | None, lora: LoraSegments | None) -> Routes:
    """`Ops.route`."""
    weights, chosen = choose_experts(logits.float(), routing, correction)
    num_experts = logits.shape[1]
    order = chosen.flatten().argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    tokens = order // chosen.shape[1]
    starts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(torch.bincount(chosen.flatten(), minlength=num_experts), 0, out=starts[1:])
    segments = None if lora is None else _segments(len(logits), tokens, starts, lora)
    return Routes(weights, rows.view_as(chosen), tokens, starts, segments)


def choose_experts(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights of each token's experts and their numbers: [T, E] → float32 [T, k], int64 [T, k]"""
    if routing.score == "softmax_of_near":
        return _one_by_one(logits, routing)
    late = routing.score == "late_sigmoid"
    scores = logits if late else logits.softmax(dim=-1) if routing.score == "softmax" else logits.sigmoid()
    choosable = _of_kept_groups(scores if correction is None else scores + correction, routing)
    chosen = choosable.topk(routing.per_token, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if late:  # rounded from more bits, so that none of them is of the place in a vector
        weights = weights.double().sigmoid_().float()
    if routing.normalised:
        weights /= weights.sum(dim=-1, keepdim=True).clamp_(min=routing.least_sum)
    return weights * routing.scale, chosen


def _one_by_one(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each time the best of the experts that are left, weighed against those that are near it."""
    weights, chosen, left = [], [], logits
    for _ in range(routing.per_token):
        best, expert = left.max(dim=-1, keepdim=True)
        far = (best - left) / torch.maximum(logits.abs(), best) > routing.near
        weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, expert))
        chosen.append(expert)
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(chosen, dim=-1)


def _of_kept_groups(scores: Tensor, routing: Routing) -> Tensor:
    """The scores, with −inf for experts of groups that are not kept."""
    if routing.groups == 1:
        return scores
    grouped = scores.view(len(scores), routing.groups, -1)
    kept = grouped.topk(routing.group_best, dim=-1).values.sum(dim=-1).topk(routing.groups_kept, dim=-1).indices
    left = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, kept, False)
    return grouped.masked_fill(left.unsqueeze(-1), -torch.inf).flatten(1)


def _segments(num_tokens: int, tokens: Tensor, starts: Tensor, lora: LoraSegments) -> LoraSegments:
    """The rows of each adapter at each expert: as the tokens of an adapter lie together, so do their rows there."""
    of_token = np.full(num_tokens, -1)
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
    columns = torch.from_numpy(np.stack((slots, first, end)).astype(np.int32)).to(tokens.device)
    return segments_of(columns)


def segments_of(columns: Tensor) -> LoraSegments:
    """Segments from their slots, first rows and end rows: int32 [3, G]"""
    ranges = tuple(zip(*columns.tolist(), strict=True))
    return LoraSegments(ranges, columns[0], columns[1], columns[2])
