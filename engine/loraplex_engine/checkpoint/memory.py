"""The process's memory, where the allocator's behaviour costs time or space."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14, <linux/mman.h>: fault pages in, writable, and leave what is in them


def empty_matrix(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, but on transparent huge pages if it is large and the host's: a fault for 2 MiB, not for 4 KiB."""
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count * dtype.itemsize < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # which keeps `memory`


def populate(tensors: Sequence[Tensor]) -> threading.Thread:
    """Have the system provide the pages of these host tensors now, in a thread: else it clears each when it is first
    written to, in the middle of a step.

    All tensors advance together, from their beginnings. What they hold stays, and they may be used meanwhile. Where the
    system cannot do that (Linux before 5.14), nothing happens: pages come when they are written to.
    """
    thread = threading.Thread(target=_populate, args=(list(tensors),), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(tensors: list[Tensor]) -> None:
    for offset in range(0, max((tensor.nbytes for tensor in tensors), default=0), HUGE_PAGE_BYTES):
        for tensor in tensors:
            # whole pages only: what lies around a tensor is not ours
            first = tensor.data_ptr() + offset
            last = min(first + HUGE_PAGE_BYTES, tensor.data_ptr() + tensor.nbytes)
            first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last and _c_library().madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_POPULATE_WRITE
            ):
                return


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
