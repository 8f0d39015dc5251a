"""The tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.ops import AttentionMetadata, LoraSegments


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a model's forward pass reads. The rows of one sequence are adjacent; base rows come before adapter rows."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionMetadata
    lora: LoraSegments | None  # None: no row of this step uses an adapter
    logits_rows: Tensor  # int64 [L]: the rows whose logits are needed
