"""The adapters of a linear on the device: how one is laid out, and the table by which the kernels find it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.lora_shape import LoraShape
from loraplex_kernels.ops import LoraWeights, PackedLora
from loraplex_kernels.transfers import to_device

MAX_SLICES = tl.constexpr(8)
# An entry of the table, int64 each: the address of A, the sum of ranks, the number of slices, the address of gain and
# offset (0: none), then MAX_SLICES addresses of Bᵀ, first ranks, ranks, first output columns, numbers of output
# columns.
A_ADDRESS = tl.constexpr(0)
SUM_OF_RANKS = tl.constexpr(1)
NUM_SLICES = tl.constexpr(2)
AFFINE_ADDRESS = tl.constexpr(3)
B_ADDRESS = tl.constexpr(8)
RANK_START = tl.constexpr(16)
RANK = tl.constexpr(24)
OUT_START = tl.constexpr(32)
OUT_FEATURES = tl.constexpr(40)
ENTRY_SIZE = tl.constexpr(48)

ADDRESS_ALIGNMENT = 16  # bytes: what a GPU reads at once
ALIGNMENT = tl.constexpr(8)  # elements: rows of Bᵀ begin at multiples of it, 16 bytes for 16-bit weights
MIN_RANK_STEP = 16  # what tensor cores multiply at a time


class Growth:
    """Counts how often any table of a device had to widen, or needed another kernel for the first time: a CUDA graph
    captured before must be captured again."""

    def __init__(self) -> None:
        self.count = 0


class _Part(NamedTuple):
    rank_start: int
    rank: int
    out_start: int
    out_features: int


class TritonLora:
    """One adapter at one linear, in host memory in the device's layout: A as it is, each B transposed, gain and offset.

    All of it lies in one tensor, which one copy brings to the device. For a CUDA device it is page-locked, so that
    nobody waits for that.
    """

    def __init__(self, weights: LoraWeights, device: torch.device) -> None:
        _check_slices(weights)
        self.shape = LoraShape.of(weights)
        self.dtype = weights.a.dtype
        self.sum_of_ranks = len(weights.a)
        self.parts = tuple(
            _Part(part.rank_start, part.b.shape[1], part.out_start, part.b.shape[0]) for part in weights.slices
        )
        self.has_affine = weights.affine is not None
        tensors = [weights.a, *(_transposed(part.b) for part in weights.slices)]
        tensors += [] if weights.affine is None else [weights.affine]
        sizes = [-(-tensor.nbytes // ADDRESS_ALIGNMENT) * ADDRESS_ALIGNMENT for tensor in tensors]
        self.offsets = [0, *accumulate(sizes)][:-1]  # of A, each B, gain and offset
        packed = torch.empty(sum(sizes), dtype=torch.uint8)
        for offset, tensor in zip(self.offsets, tensors, strict=True):
            packed[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.packed = packed.pin_memory() if device.type == "cuda" else packed

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def entry(self, address: int) -> np.ndarray:
        """What a table has of it once it lies at this address: int64 [ENTRY_SIZE]"""
        addresses = [address + offset for offset in self.offsets]
        entry = np.zeros(ENTRY_SIZE.value, dtype=np.int64)
        entry[A_ADDRESS.value] = addresses[0]
        entry[SUM_OF_RANKS.value] = self.sum_of_ranks
        entry[NUM_SLICES.value] = len(self.parts)
        entry[AFFINE_ADDRESS.value] = addresses[-1] if self.has_affine else 0
        for i, part in enumerate(self.parts):
            entry[B_ADDRESS.value + i] = addresses[1 + i]
            entry[RANK_START.value + i] = part.rank_start
            entry[RANK.value + i] = part.rank
            entry[OUT_START.value + i] = part.out_start
            entry[OUT_FEATURES.value + i] = part.out_features
        return entry


class TritonLoraTable:
    """The adapters resident at one linear, on the device: A as it is, B transposed, and the table of their
    addresses.
    """

    def __init__(
        self, in_features: int, out_features: int, num_slots: int, device: torch.device, growth: Growth
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        # Powers of two, no less than what any adapter that was ever here had:
        self.capacity = 0  # sum of ranks; 0: none was here
        self.slice_capacity = MIN_RANK_STEP  # rank of one projection
        self.has_scaled = False  # whether any adapter that was ever here had gain and offset
        self.entries = torch.zeros((num_slots, ENTRY_SIZE.value), dtype=torch.int64, device=device)
        self._dtype: torch.dtype | None = None
        self._held: list[Tensor | None] = [None] * num_slots  # what the entries point at
        self._device = device
        self._growth = growth

    def put(self, slot: int, packed: PackedLora) -> None:
        assert isinstance(packed, TritonLora)
        packed.shape.check_fits(self.in_features, self.out_features)
        self.check_dtype(packed.dtype)
        there = self._held[slot] = packed.packed.to(self._device, non_blocking=True)
        (entry,) = to_device([packed.entry(there.data_ptr())], self._device)
        self.entries[slot].copy_(entry)
        if packed.has_affine and not self.has_scaled:
            self.has_scaled = True
            self._growth.count += 1
        self._widen(packed.sum_of_ranks, max((part.rank for part in packed.parts), default=0))

    def remove(self, slot: int) -> None:
        if self._held[slot] is not None:
            self.entries[slot].zero_()
            self._held[slot] = None

    def reserve(self, num_slices: int, rank: int) -> None:
        """Widen the table in advance for adapters with so many projections of up to that rank."""
        self._widen(num_slices * rank, rank)

    def _widen(self, sum_of_ranks: int, slice_rank: int) -> None:
        self.slice_capacity = max(self.slice_capacity, _room_for(slice_rank))
        if sum_of_ranks > self.capacity:
            self.capacity = _room_for(sum_of_ranks)
            self._growth.count += 1

    def check_dtype(self, dtype: torch.dtype) -> None:
        """The kernels read every adapter as the dtype of the activations. Raises ValueError for a second one."""
        if self._dtype not in (None, dtype):
            raise ValueError(f"adapter and activations at one linear must share a dtype: got {self._dtype} and {dtype}")
        self._dtype = dtype


class TritonLoraTables:
    """The tables of several experts, whose entries lie in one tensor: one slot of each after another."""

    def __init__(self, tables: Sequence[TritonLoraTable]) -> None:
        first = tables[0]
        self.num_experts = len(tables)
        self.in_features, self.out_features = first.in_features, first.out_features
        self.entries = torch.stack([table.entries for table in tables], dim=1).flatten(0, 1)
        for expert, table in enumerate(tables):
            table.entries = self.entries[expert :: self.num_experts]
        self._tables = tuple(tables)

    @property
    def capacity(self) -> int:
        return max(table.capacity for table in self._tables)

    @property
    def slice_capacity(self) -> int:
        return max(table.slice_capacity for table in self._tables)

    @property
    def has_scaled(self) -> bool:
        return any(table.has_scaled for table in self._tables)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """As that of a table."""
        for table in self._tables:
            table.check_dtype(dtype)


def _room_for(rank: int) -> int:
    return max(MIN_RANK_STEP, int(triton.next_power_of_2(rank)))


def _check_slices(weights: LoraWeights) -> None:
    if len(weights.slices) > MAX_SLICES.value:
        raise ValueError(f"an adapter has {len(weights.slices)} slices at one linear, at most {MAX_SLICES.value} fit")
    if any(part.b.dtype != weights.a.dtype for part in weights.slices):
        raise ValueError("LoRA A and B of one linear must share a dtype")


def _transposed(b: Tensor) -> Tensor:
    """[N, R] → [R, N], each row beginning on 16 bytes."""
    n, rank = b.shape
    stride = triton.cdiv(n, ALIGNMENT.value) * ALIGNMENT.value
    b_t = torch.zeros((rank, stride), dtype=b.dtype, device=b.device)
    b_t[:, :n] = b.t()
    return b_t
