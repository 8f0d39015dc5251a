"""The process's own memory, where what the allocator does with it shows."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def empty_matrix(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, but on transparent huge pages if it is large and the host's: a fault for 2 MiB, not for 4 KiB."""
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count * dtype.itemsize < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # which keeps `memory`


def release_free_memory() -> None:
    """Give memory that is free in the allocator back to the system, where the C library can (glibc's malloc_trim).

    glibc keeps what is freed between blocks in use for later: temporaries of different sizes leave more behind than
    any of them takes.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
