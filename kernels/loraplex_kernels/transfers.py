"""Copies between the host and a device: many arrays or tensors in one, which nobody waits for before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

PACKED_ALIGNMENT = 16  # bytes: what a GPU reads at once

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What is to be read from a device, and what is made of it on the host."""

    tensors: Sequence[Tensor]
    finish: Callable[[Iterator[Tensor]], T]  # takes as many tensors of the host's as it has of the device's, in order


def to_host(tensors: Sequence[Tensor], device: torch.device) -> Callable[[], Sequence[Tensor]]:
    """Begin to copy tensors of a device. What is returned waits for all of them at once."""
    if device.type == "cpu" or not tensors:
        return lambda: tensors
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    done.record(torch.cuda.current_stream(device))

    def arrived() -> list[Tensor]:
        done.synchronize()
        return copies

    return arrived
