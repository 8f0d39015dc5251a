"""Memory for the results of a step's operations."""

from __future__ import annotations

import math
import mmap
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.library import Library

SMALLEST = 1 << 20  # bytes; what is smaller malloc keeps by itself


class ResultMemory:
    """Keeps the memory of large results for later ones.

    malloc returns large areas to the system when they are freed, so that each step would fault in every page again: in
    steps that compute prompts this took up to a fifth of the time. There are never more areas than simultaneous
    results.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._free: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype of `like`. Its memory is not reused while a view of it lives."""
        num_bytes = math.prod(shape) * like.element_size()
        if num_bytes < SMALLEST:
            return like.new_empty(shape)
        area = self._take(num_bytes)
        held = area[:num_bytes]  # by the tensor's storage, until nothing refers to that any more
        weakref.finalize(held, self._free.append, area).atexit = False
        return torch.from_numpy(held).view(like.dtype).view(shape)

    def _take(self, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The smallest free area that is large enough; else a new one that replaces the smallest free area."""
        by_size = sorted((area.nbytes, -index) for index, area in enumerate(self._free))
        for nbytes, index in by_size:
            if nbytes >= num_bytes:
                return self._free.pop(-index)  # of equal ones that which was freed last: the caches may hold it
        if by_size:
            del self._free[-by_size[0][1]]
        area = np.frombuffer(mmap.mmap(-1, 1 << (num_bytes - 1).bit_length()), np.uint8)
        self._library.advise_huge_pages(area.ctypes.data, area.nbytes)
        return area
