"""The input of a model's forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.ops import AttentionMetadata, LoraSegments


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The input of a forward pass. The rows of one sequence are adjacent; base rows come before adapter rows."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionMetadata
    lora: LoraSegments | None  # None: no row of this step uses an adapter
    logits_rows: Tensor  # int64 [L]: the rows whose logits are needed, those that are sampled from first
    logits_lora: LoraSegments | None = None  # `lora` of these rows, numbered as in `logits_rows`
