"""The tensors of one step."""

from __future__ import annotations

import numpy as np
import torch

from loraplex_engine.execution.arrays import Ranges, StepArrays
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, LoraSegments
from loraplex_kernels.transfers import to_device


def step_batch(step: StepArrays, device: torch.device) -> StepBatch:
    """The step's arrays as tensors on `device`."""
    same = step.logits_lora == step.lora  # as where every row is drawn from
    segments = _columns(step.lora) + ([] if same else _columns(step.logits_lora))
    fixed = [step.token_ids, step.positions, step.slot_mapping, step.logits_rows]
    sequences = [step.query_starts, step.seq_lens, step.block_tables]
    on_device = to_device([*fixed, *sequences, *segments], device)
    lora = LoraSegments(step.lora, *on_device[7:10]) if step.lora else None
    logits_lora = LoraSegments(step.logits_lora, *on_device[-3:]) if step.logits_lora else None
    return StepBatch(
        token_ids=on_device[0],
        positions=on_device[1],
        attention=AttentionMetadata(
            slot_mapping=on_device[2],
            query_starts=on_device[4],
            seq_lens=on_device[5],
            block_tables=on_device[6],
            max_query_len=step.max_query_len,
            max_seq_len=step.max_seq_len,
        ),
        lora=lora,
        logits_rows=on_device[3],
        logits_lora=lora if same else logits_lora,
    )


def _columns(ranges: Ranges) -> list[np.ndarray]:
    """Slots, first rows and end rows of the ranges, int32 [G] each; nothing where there are none."""
    return list(np.array(ranges, dtype=np.int32).T) if ranges else []


def narrowed(segments: LoraSegments | None, start: int, end: int, device: torch.device) -> LoraSegments | None:
    """The segments of rows start … end, numbered from `start`."""
    if segments is None:
        return None
    inside = [(slot, max(first, start) - start, min(last, end) - start) for slot, first, last in segments.ranges]
    ranges = [(slot, first, last) for slot, first, last in inside if first < last]
    if not ranges:
        return None
    return LoraSegments(tuple(ranges), *to_device(_columns(tuple(ranges)), device))
