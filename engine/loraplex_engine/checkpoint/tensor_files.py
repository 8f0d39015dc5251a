"""Files of tensors: what a checkpoint asks of one, and the safetensors among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError

ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1},
}
LFS_POINTER = b"version https://git-lfs"

Part = tuple[slice, ...]  # of each dimension of a tensor; (): all of it


class TensorFile(Protocol):
    """An open file of tensors, mapped and not read ahead."""

    @property
    def path(self) -> Path: ...

    def entries(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        """The name, the shape, the format's code of the dtype, and the bytes of each tensor."""

    def pieces(self, name: str, part: Part) -> Iterator[Tensor]:
        """A tensor or a part of it: all at once, or some of its rows at a time. It may lie in the mapped file."""

    def raw(self, name: str) -> Tensor:
        """A tensor as it is stored. It may lie in the mapped file."""


class SafetensorsFile:
    """One file of safetensors."""

    def __init__(self, path: Path, closing: ExitStack) -> None:
        """Raises ModelError if it is damaged or missing."""
        self.path = path
        try:
            self._file = closing.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise ModelError(f"{path}: named by the index, but not there: complete the download") from None
        except (SafetensorError, OSError) as error:
            if path.is_file():
                with path.open("rb") as damaged:
                    check_fetched(path, damaged.read(len(LFS_POINTER)))
            raise ModelError(f"{path}: not a valid safetensors file ({error}): fetch it again") from error

    def entries(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        for name in self._file.keys():  # noqa: SIM118 (not a mapping)
            part = self._file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            yield name, shape, dtype, ITEM_BYTES.get(dtype, 0) * torch.Size(shape).numel()

    def pieces(self, name: str, part: Part) -> Iterator[Tensor]:
        # A slice is copied where a whole tensor stays in the mapped file.
        part_of_it = self._file.get_slice(name)
        whole = shape_of(part_of_it.get_shape(), part) == tuple(part_of_it.get_shape())
        yield self.raw(name) if whole else part_of_it[part]

    def raw(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def shape_of(shape: Sequence[int], part: Part) -> tuple[int, ...]:
    return (*(each.stop - each.start for each in part), *shape[len(part) :])


def check_fetched(path: Path, data: bytes) -> None:
    """data: the file's first bytes, or all. Raises ModelError if Git has left a note of where the file is instead."""
    if data.startswith(LFS_POINTER):
        raise ModelError(f"{path}: is a Git LFS pointer, not the file: run `git lfs pull` in {path.parent}")
