"""The tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.models.step_batch import StepBatch
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan
from loraplex_kernels.ops import AttentionMetadata, LoraSegments

PACKED_ALIGNMENT = 16  # bytes: what a GPU reads at once


def step_batch(plan: StepPlan, block_size: int, device: torch.device) -> StepBatch:
    """Lay the plan's tokens side by side and say where each one sits in its sequence and in the cache."""
    scheduled = plan.scheduled
    counts = np.array([item.num_new_tokens for item in scheduled], dtype=np.int32)
    computed = np.array([item.num_computed_tokens for item in scheduled], dtype=np.int64)
    starts = np.zeros(len(scheduled) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    seq_lens = (computed + counts).astype(np.int32)

    tables = _block_tables(scheduled, int(seq_lens.max()), block_size)
    sequence_of = np.repeat(np.arange(len(scheduled)), counts)
    positions = np.arange(starts[-1]) - starts[:-1][sequence_of] + computed[sequence_of]
    slots = tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size

    ranges = _lora_ranges(scheduled, starts)
    segments = np.array(ranges, dtype=np.int32).reshape(-1, 3).T  # slots, starts, ends
    token_ids, logits_rows = _token_ids(scheduled), _logits_rows(scheduled, starts)
    logits_ranges = _ranges_of_rows(ranges, logits_rows)
    logits_segments = np.array(logits_ranges, dtype=np.int32).reshape(-1, 3).T
    fixed = [token_ids, positions, slots, logits_rows, starts, seq_lens, tables]
    on_device = to_device([*fixed, *segments, *logits_segments], device)
    return StepBatch(
        token_ids=on_device[0],
        positions=on_device[1],
        attention=AttentionMetadata(
            slot_mapping=on_device[2],
            query_starts=on_device[4],
            seq_lens=on_device[5],
            block_tables=on_device[6],
            max_query_len=int(counts.max()),
            max_seq_len=int(seq_lens.max()),
        ),
        lora=LoraSegments(tuple(ranges), *on_device[7:10]) if ranges else None,
        logits_rows=on_device[3],
        logits_lora=LoraSegments(tuple(logits_ranges), *on_device[10:]) if logits_ranges else None,
    )


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


def _token_ids(scheduled: tuple[ScheduledRequest, ...]) -> np.ndarray:
    tokens: list[int] = []
    for item in scheduled:
        first = item.num_computed_tokens
        if item.num_new_tokens == 1:
            tokens.append(item.request.token_ids[first])
        else:
            tokens.extend(item.request.token_ids[first : first + item.num_new_tokens])
    return np.array(tokens, dtype=np.int64)


def _block_tables(scheduled: tuple[ScheduledRequest, ...], max_seq_len: int, block_size: int) -> np.ndarray:
    tables = np.zeros((len(scheduled), -(-max_seq_len // block_size)), dtype=np.int32)
    for row, item in enumerate(scheduled):
        block_ids = item.request.block_ids
        tables[row, : len(block_ids)] = block_ids
    return tables


def _lora_ranges(scheduled: tuple[ScheduledRequest, ...], starts: np.ndarray) -> list[tuple[int, int, int]]:
    """(slot, first row, end row) of each adapter's adjacent rows; what comes before an invocation is the base's."""
    ranges: list[tuple[int, int, int]] = []
    for item, start, end in zip(scheduled, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        slot = item.request.adapter_slot
        if slot is None or item.request.adapter_start is None:
            continue
        if item.request.adapter_start > item.num_computed_tokens:
            start += item.request.adapter_start - item.num_computed_tokens
            if start >= end:
                continue
        if ranges and ranges[-1][0] == slot and ranges[-1][2] == start:
            ranges[-1] = (slot, ranges[-1][1], end)
        else:
            ranges.append((slot, start, end))
    return ranges


def _ranges_of_rows(ranges: list[tuple[int, int, int]], rows: np.ndarray) -> list[tuple[int, int, int]]:
    """The adapters' ranges among some selected rows, numbered by their place in the selection."""
    found: list[tuple[int, int, int]] = []
    if not ranges:
        return found
    slots, starts, ends = zip(*ranges, strict=True)
    nearest = np.searchsorted(starts, rows, side="right") - 1  # -1: before the first
    for place, (row, index) in enumerate(zip(rows.tolist(), nearest.tolist(), strict=True)):
        if index < 0 or row >= ends[index]:
            continue
        if found and found[-1][0] == slots[index] and found[-1][2] == place:
            found[-1] = (slots[index], found[-1][1], place + 1)
        else:
            found.append((slots[index], place, place + 1))
    return found


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


def _logits_rows(scheduled: tuple[ScheduledRequest, ...], starts: np.ndarray) -> np.ndarray:
    """The last row of every request that samples, then every row that predicts a prompt token someone asked about."""
    rows = [int(end) - 1 for item, end in zip(scheduled, starts[1:], strict=True) if item.samples]
    for item, start in zip(scheduled, starts[:-1], strict=True):
        rows.extend(range(int(start), int(start) + num_prompt_logprob_rows(item)))
    return np.array(rows, dtype=np.int64)


def num_prompt_logprob_rows(item: ScheduledRequest) -> int:
    """The number of the item's rows that predict a prompt token whose log-probability was asked for."""
    if item.request.sampling.num_prompt_logprobs is None:
        return 0
    return max(0, min(item.num_new_tokens, item.request.num_prompt_tokens - 1 - item.num_computed_tokens))
