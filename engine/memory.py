"""The process's own memory, where what the allocator does with it shows."""

from __future__ import annotations

import ctypes


def release_free_memory() -> None:
    """Give memory that is free in the allocator back to the system, where the C library can (glibc's malloc_trim).

    glibc keeps what is freed between blocks in use for later: temporaries of different sizes leave more behind than
    any of them takes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
