"""Adapters at linears, in the compiled kernels' memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from loraplex_kernels.cpu.library import Library, owned
from loraplex_kernels.cpu.linear import dtype_code
from loraplex_kernels.lora_shape import LoraShape
from loraplex_kernels.ops import LoraWeights, PackedLora


class CpuLora:
    """One adapter at one linear, with A and B in the order in which they are read. Shares no memory with `weights`."""

    def __init__(self, library: Library, weights: LoraWeights) -> None:
        self.shape = LoraShape.of(weights)
        self.dtype = weights.a.dtype
        affine = None if weights.affine is None else weights.affine.contiguous()
        matrices = [weights.a.contiguous(), *(part.b.contiguous() for part in weights.slices)]
        if any(matrix.dtype != self.dtype for matrix in matrices):
            raise ValueError(f"LoRA B of another dtype than A, which is {self.dtype}: convert them first")
        parts = [
            number
            for part in weights.slices
            for number in (part.rank_start, part.b.shape[1], part.out_start, part.b.shape[0])
        ]
        rank, in_features = weights.a.shape
        a, *b = (matrix.data_ptr() for matrix in matrices)
        numbers, pointers = (ctypes.c_int64 * len(parts))(*parts), (ctypes.c_void_p * len(b))(*b)
        self.handle = owned(
            self,
            library.lora_create(
                library.context,
                dtype_code(self.dtype),
                in_features,
                a,
                rank,
                len(b),
                numbers,
                pointers,
                None if affine is None else affine.data_ptr(),
                0 if affine is None else affine.shape[1],
            ),
            library.lora_destroy,
            library,
        )
        self.nbytes: int = library.lora_bytes(self.handle)


class CpuLoraTable:
    """The adapters resident at one linear. The first adapter sets the table's dtype."""

    def __init__(self, in_features: int, out_features: int, num_slots: int) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.dtype: torch.dtype | None = None
        self.handles = np.zeros(num_slots, dtype=np.uintp)  # 0: an empty slot
        self.address = self.handles.ctypes.data
        self._held: list[CpuLora | None] = [None] * num_slots

    def put(self, slot: int, packed: PackedLora) -> None:
        assert isinstance(packed, CpuLora)
        packed.shape.check_fits(self.in_features, self.out_features)
        self._check_slot(slot)
        if self.dtype not in (None, packed.dtype):
            raise ValueError(f"LoRA weights of {packed.dtype} beside adapters of {self.dtype}: convert them first")
        self.dtype = packed.dtype
        self.handles[slot] = packed.handle
        self._held[slot] = packed

    def remove(self, slot: int) -> None:
        self._check_slot(slot)
        self.handles[slot] = 0
        self._held[slot] = None

    def reserve(self, num_slices: int, rank: int) -> None:
        """Nothing to do: each adapter has its own memory."""

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._held):
            raise ValueError(f"slot {slot} is not in a table of {len(self._held)}")


class CpuLoraTables:
    """The tables of several experts, whose handles lie in one array: one slot of each after another."""

    def __init__(self, tables: Sequence[CpuLoraTable]) -> None:
        first = tables[0]
        self.in_features, self.out_features = first.in_features, first.out_features
        self.num_experts = len(tables)
        self._tables = tuple(tables)
        handles = np.stack([table.handles for table in tables], axis=1)
        for expert, table in enumerate(tables):
            table.handles = handles[:, expert]
            del table.address
        self.address = handles.ctypes.data

    @property
    def dtype(self) -> torch.dtype | None:
        return next((table.dtype for table in self._tables if table.dtype is not None), None)
