"""The tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.execution.arrays import Ranges, StepArrays
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, LoraSegments

PACKED_ALIGNMENT = 16  # bytes: what a GPU reads at once


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


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on `device`, which a GPU receives in one copy that nobody waits for."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    # torch hands page-locked memory out again only when the copies from it are done.
    return unpack(pack(arrays, pinned=True).to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[np.ndarray], pinned: bool) -> Tensor:
    """The bytes of all arrays one after the other, each beginning at a multiple of 16 → uint8 [bytes]"""
    packed = torch.empty(sum(map(_packed_bytes, arrays)), dtype=torch.uint8, pin_memory=pinned)
    buffer, start = packed.numpy(), 0
    for array in arrays:
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _packed_bytes(array)
    return packed


def unpack(packed: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The tensors that `pack` made of `arrays`; they share its memory."""
    tensors, start = [], 0
    for array in arrays:
        dtype = torch.from_numpy(array[:0]).dtype
        tensors.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _packed_bytes(array)
    return tensors


def _packed_bytes(array: np.ndarray) -> int:
    return -(-array.nbytes // PACKED_ALIGNMENT) * PACKED_ALIGNMENT


def narrowed(segments: LoraSegments | None, start: int, end: int) -> LoraSegments | None:
    """The segments of rows start … end, numbered from `start`."""
    if segments is None:
        return None
    inside = [(slot, max(first, start) - start, min(last, end) - start) for slot, first, last in segments.ranges]
    ranges = [(slot, first, last) for slot, first, last in inside if first < last]
    if not ranges:
        return None
    columns = torch.tensor(ranges, dtype=torch.int32).T.contiguous().to(segments.slots.device)
    return LoraSegments(tuple(ranges), columns[0], columns[1], columns[2])
