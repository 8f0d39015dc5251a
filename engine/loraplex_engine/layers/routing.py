"""Which experts a token goes to, and how much each of them counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """From a router's logits to the experts of each token."""

    per_token: int  # k
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True  # the weights of a token's experts are divided by their sum
    least_sum: float = 0.0  # which is then at least this
    scale: float = 1.0  # of the weights, at last
    groups: int = 1  # of neighbouring experts
    groups_kept: int = 1  # from which a token's experts are chosen: those whose two best experts have the highest sum

    def __call__(self, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weights of each token's experts and their numbers: [T, E] → float32 [T, k], int64 [T, k]

        correction: [E], added to the scores to choose by, not to the weights.
        """
        logits = logits.float()
        scores = logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()
        if correction is None and self.groups == 1:
            weights, chosen = scores.topk(self.per_token, dim=-1)
        else:
            choosable = scores if correction is None else scores + correction
            chosen = self._within_groups(choosable).topk(self.per_token, dim=-1).indices
            weights = scores.gather(-1, chosen)
        if self.normalised:
            weights /= weights.sum(dim=-1, keepdim=True).clamp_(min=self.least_sum)
        return (weights if self.scale == 1.0 else weights * self.scale), chosen

    def _within_groups(self, scores: Tensor) -> Tensor:
        """The scores, with −inf for experts of groups that are not kept."""
        if self.groups == 1:
            return scores
        grouped = scores.view(len(scores), self.groups, -1)
        kept = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.groups_kept, dim=-1).indices
        left = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, kept, False)
        return grouped.masked_fill(left.unsqueeze(-1), -torch.inf).flatten(1)
