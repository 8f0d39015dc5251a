"""Returns memory to the system that the allocator still keeps after a burst of large requests."""

import asyncio
import ctypes
import os
from pathlib import Path

LOOK_SECONDS = 2.0
WORTH_BYTES = 16 << 20  # that the process has grown by: giving back takes time, and taking again, too
GROWTH_BYTES = 1 << 20  # from one look to the next, that is taken for lasting

_STATM = Path("/proc/self/statm")


async def keep_giving_back() -> None:
    """Trim the heap whenever the process has grown. Returns only where trimming is not possible."""
    trim, usual = getattr(ctypes.CDLL(None), "malloc_trim", None), _resident_bytes()
    if trim is None or usual is None:
        return
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        resident = _resident_bytes() or 0
        if resident > usual + WORTH_BYTES:
            await asyncio.to_thread(trim, 0)
        usual = min(usual + GROWTH_BYTES, resident)


def _resident_bytes() -> int | None:
    """The resident memory of this process in bytes; None: the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
