"""The memory of the prefix cache's host tier, and the copies between it and the device.

On a GPU the copies run on a stream of their own. What a step overwrites is set aside on the device first, which takes
microseconds, so that no step waits for the bus; what comes back is waited for by the step after.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.link.config import EngineConfig
from loraplex_engine.scheduling.host_blocks import BlockMoves
from loraplex_kernels.ops import LayerKV
from loraplex_kernels.transfers import to_device

RESTORED_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}  # before one step: some milliseconds beside it
STAGED_BYTES = 64 << 20  # of a GPU's memory, for blocks on their way to the host


class HostCache:
    """Slots in host memory, each of one block: the parts of all layers one after the other, as kernels lay them out."""

    def __init__(self, layers: Sequence[LayerKV], num_slots: int, device: torch.device) -> None:
        self._parts = [_rows(tensor) for layer in layers for tensor in layer.tensors()]
        ends = np.cumsum([part.shape[1] for part in self._parts]).tolist()
        self._places = [slice(end - part.shape[1], end) for part, end in zip(self._parts, ends, strict=True)]
        self.block_bytes: int = ends[-1]
        self.num_slots = num_slots
        self.slots = torch.empty((num_slots, self.block_bytes), dtype=torch.uint8)  # takes room once it is written to
        self.most_restored = max(1, RESTORED_BYTES[device.type] // self.block_bytes)
        self._copier = _HostCopier(self) if device.type == "cpu" else _StreamCopier(self, device)

    def move(self, moves: BlockMoves) -> None:
        """Copy blocks, ahead of a step. Called before each step."""
        self._copier.move(moves)

    def settle(self) -> None:
        """Wait until all that was to be copied from and to the slots is. Any thread may call it."""
        self._copier.settle()

    def pairs(self) -> list[tuple[Tensor, slice]]:
        """Each part of the device's blocks [B, bytes], and where it lies in a slot."""
        return list(zip(self._parts, self._places, strict=True))


class _HostCopier:
    """Copies within the host's memory, at once: a block takes some ten microseconds."""

    def __init__(self, cache: HostCache) -> None:
        self._slots = cache.slots.numpy()
        self._pairs = [(part.numpy(), place) for part, place in cache.pairs()]

    def move(self, moves: BlockMoves) -> None:
        for block, slot in moves.saved:
            for part, place in self._pairs:
                self._slots[slot, place] = part[block]
        for slot, block in moves.restored:
            for part, place in self._pairs:
                part[block] = self._slots[slot, place]

    def settle(self) -> None:
        """It is there already."""


class _StreamCopier:
    """Copies over the bus, beside the steps."""

    def __init__(self, cache: HostCache, device: torch.device) -> None:
        _lock_pages(cache.slots)
        self._slots = cache.slots
        self._pairs = cache.pairs()
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._at_once = max(1, STAGED_BYTES // cache.block_bytes)
        shape = self._at_once, cache.block_bytes
        self._staged = torch.empty(shape, dtype=torch.uint8, device=device)  # on their way to the host
        self._arrived = torch.empty(shape, dtype=torch.uint8, device=device)  # on their way back

    def move(self, moves: BlockMoves) -> None:
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)  # for what came back before the step before
        for first in range(0, len(moves.saved), self._at_once):
            if first:
                compute.wait_stream(self._stream)  # until the staging memory is free again
            self._save(moves.saved[first : first + self._at_once], compute)
        if moves.restored:
            self._stream.wait_stream(compute)  # the blocks may have been read until now
            with torch.cuda.stream(self._stream):
                for first in range(0, len(moves.restored), self._at_once):
                    self._restore(moves.restored[first : first + self._at_once])

    def settle(self) -> None:
        self._stream.synchronize()

    def _save(self, saved: Sequence[tuple[int, int]], compute: torch.cuda.Stream) -> None:
        count, blocks = len(saved), self._indices([block for block, _ in saved])
        for part, place in self._pairs:
            self._staged[:count, place] = part.index_select(0, blocks)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for place_of, (_, slot) in enumerate(saved):
                self._slots[slot].copy_(self._staged[place_of], non_blocking=True)

    def _restore(self, restored: Sequence[tuple[int, int]]) -> None:
        for place_of, (slot, _) in enumerate(restored):
            self._arrived[place_of].copy_(self._slots[slot], non_blocking=True)
        count, blocks = len(restored), self._indices([block for _, block in restored])
        for part, place in self._pairs:
            part.index_copy_(0, blocks, self._arrived[:count, place])

    def _indices(self, numbers: list[int]) -> Tensor:
        (indices,) = to_device([np.array(numbers, dtype=np.int64)], self._device)
        return indices


def host_cache(layers: Sequence[LayerKV], num_bytes: int, device: torch.device) -> HostCache:
    """The host tier of a cache within a number of bytes. Raises ValueError if they hold no block."""
    block_bytes = sum(layer.nbytes for layer in layers) // layers[0].num_blocks
    if num_bytes < block_bytes:
        raise ValueError(f"host_cache_bytes {num_bytes} hold no block of {block_bytes} bytes: raise it, or set it to 0")
    return HostCache(layers, num_bytes // block_bytes, device)


def staging_bytes(config: EngineConfig) -> int:
    """A GPU's memory for blocks that are on their way, about."""
    return 2 * STAGED_BYTES if config.host_cache_bytes else 0


def _rows(tensor: Tensor) -> Tensor:
    """A tensor of blocks as the bytes of each: [B, …] → uint8 [B, bytes], the same memory."""
    return tensor.view(len(tensor), -1).view(torch.uint8)


def _lock_pages(memory: Tensor) -> None:
    """Have the host's memory be copied from and to without the CPU. Not torch's own: that takes powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    status = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if status != runtime.cudaError.success:
        raise ValueError(
            f"host_cache_bytes: {memory.nbytes} bytes of host memory cannot be locked ({status}): lower it, or let the "
            "process lock as many"
        )
