"""The tensors of an adapter's file, read in its order, each by the time that its values are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import BufferedIOBase

import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.safetensors import Header
from loraplex_adapters.pace import Rest, no_rest

PIECE_BYTES = 1 << 18  # read, and hashed, at once: while it is in the core's cache

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

# Is given all bytes of the file that are read, in their order.
Seen = Callable[[memoryview], object]


def unseen(piece: memoryview) -> None:
    """Do nothing with what is read."""


class FileTensors(Mapping[str, Tensor]):
    """Tensors by name, each in memory of its own. Asking for one reads the file up to its end.

    So the first can be laid out for the kernels before the last are read, or have even come.
    """

    def __init__(
        self, file: BufferedIOBase, header: Header, adapter: str, rest: Rest = no_rest, seen: Seen = unseen
    ) -> None:
        """`adapter`: its name in errors. Raises AdapterRejected for tensors that are no floats."""
        self._file = file
        self._adapter = adapter
        self._rest = rest
        self._seen = seen
        self._start = header.data_start
        self._end = header.data_start + header.data_bytes
        self._position = 0
        self._read: dict[str, Tensor] = {}
        self._unread = iter(_in_order(header))
        self.outlines: Mapping[str, Tensor] = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in header.tensors.items()
        }  # dtypes and shapes alone, for which nothing is read
        file.seek(0)

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError; AdapterRejected if the file has become shorter; OSError."""
        if name not in self.outlines:
            raise KeyError(name)
        while name not in self._read:
            self._read_next()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def read_all(self) -> None:
        """Read the file to its end. Raises AdapterRejected if it has become shorter; OSError."""
        while len(self._read) < len(self):
            self._read_next()
        self._skip_to(self._end)

    def _read_next(self) -> None:
        name, begin, end = next(self._unread)
        self._skip_to(self._start + begin)
        content = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(content)
        outline = self.outlines[name]
        self._read[name] = content.view(outline.dtype).view(outline.shape)

    def _skip_to(self, position: int) -> None:
        """Pass over the header, or what lies between tensors."""
        while self._position < position:
            self._fill(torch.empty(min(PIECE_BYTES, position - self._position), dtype=torch.uint8))

    def _fill(self, content: Tensor) -> None:
        # Not a bytearray: Python would fill it with zeros first, and hold up all other threads meanwhile.
        whole: memoryview = content.numpy().data
        for start in range(0, len(content), PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES]
            if self._file.readinto(piece) != len(piece):
                raise AdapterRejected([f"adapter {self._adapter}: its weights became shorter while they were read"])
            self._seen(piece)
            self._position += len(piece)
            self._rest()


def outlines(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors to ask for dtypes and shapes alone, so that no file is read for it."""
    return tensors.outlines if isinstance(tensors, FileTensors) else tensors


def _in_order(header: Header) -> list[tuple[str, int, int]]:
    """The tensors as they lie in the data, each with its range. Raises AdapterRejected."""
    unsupported = [
        f"{name}: dtype {entry.dtype}, a float is expected"
        for name, entry in header.tensors.items()
        if entry.dtype not in DTYPES
    ]
    if unsupported:
        raise AdapterRejected(unsupported)
    placed = sorted((*entry.data_offsets, name) for name, entry in header.tensors.items())
    return [(name, begin, end) for begin, end, name in placed]
