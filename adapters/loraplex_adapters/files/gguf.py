"""The header of a GGUF file, read and checked within limits of our own: its metadata, and where its tensors lie.

Layout, little-endian: "GGUF", a version, the numbers of tensors and of metadata entries; the entries; the tensors'
names, dimensions (the innermost first), types and offsets; then, aligned, the data. Source: the GGUF specification.
Nothing is allocated that the file has no bytes for.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

SUFFIX = ".gguf"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
FILE_OF_REPOSITORY = re.compile(r"((?!\.\.?/)[\w.-]+/)*[\w.-]+\.gguf")
MAX_PARTS = 1000
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the first one had other widths, and nobody has such files
ALIGNMENT_KEY = "general.alignment"
MAX_HEADER_BYTES = 256 << 20  # a vocabulary of 256,000 tokens and its merges need 12 MiB
MAX_ENTRIES = 1 << 14
MAX_TENSORS = 1 << 16
MAX_ITEMS = 1 << 22  # of all arrays together
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class BlockType:
    """How the elements of a row are stored: so many at a time in so many bytes."""

    name: str
    elements: int
    nbytes: int


# By number in the file.
TYPES = {
    number: BlockType(name, elements, nbytes)
    for number, name, elements, nbytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (20, "IQ4_NL", 32, 18),
        (23, "IQ4_XS", 256, 136),
        (28, "F64", 1, 8),
        (30, "BF16", 1, 2),
        (39, "MXFP4", 32, 17),
    )
}
# Named where they are refused.
OTHER_TYPES = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4"},
}


class GGUFError(ValueError):
    """The file is no GGUF file, or a damaged one. The message says what is wrong with it, and not its name."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: rows of blocks."""

    type: BlockType
    shape: tuple[int, ...]  # the innermost dimension last
    start: int  # offset in the file

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.elements * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a file says of itself, and its tensors by name, all within the file."""

    metadata: Mapping[str, object]  # numbers, texts, and lists of either
    tensors: Mapping[str, GGUFTensor]


def parts_of(path: Path) -> list[Path]:
    """The files of a model, by the name of the only one or of the first. Raises GGUFError for that of another."""
    split = PART.fullmatch(path.name)
    if split is None:
        return [path]
    stem, number, count = split[1], int(split[2]), int(split[3])
    if number != 1 or not 1 <= count <= MAX_PARTS:
        _reject(f"is part {number} of {count}: name the first one, {stem}-00001-of-{count:05}{SUFFIX}")
    return [path.with_name(f"{stem}-{place:05}-of-{count:05}{SUFFIX}") for place in range(1, count + 1)]


def hub_parts(model: str) -> tuple[str, str | None]:
    """The repository of a hub that a model's name begins with, and the GGUF file in it; None: the name has none."""
    owner, _, rest = model.partition("/")
    name, _, file = rest.partition("/")
    return (f"{owner}/{name}", file) if FILE_OF_REPOSITORY.fullmatch(file) else (model, None)


def read_gguf(file: BufferedIOBase) -> GGUFHeader:
    """Read and check the header of an open file. Raises GGUFError."""
    header = _Header(file)
    version, num_tensors, num_entries = header.start()
    if version not in VERSIONS:
        _reject(f"version {version}: {' and '.join(map(str, VERSIONS))} are read; convert it anew")
    if num_tensors > MAX_TENSORS or num_entries > MAX_ENTRIES:
        _reject(f"{num_tensors} tensors and {num_entries} entries: at most {MAX_TENSORS} and {MAX_ENTRIES} are allowed")
    metadata = dict(header.entry() for _ in range(num_entries))
    if len(metadata) != num_entries:
        _reject("an entry of its metadata is there twice")
    listed = [header.tensor() for _ in range(num_tensors)]
    alignment = metadata.get(ALIGNMENT_KEY, 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        _reject(f"{ALIGNMENT_KEY} is {alignment!r}; it must be a multiple of 8")
    data_start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, stated, shape, offset in listed:
        if name in tensors:
            _reject(f"tensor {name} is there twice")
        if offset % alignment:
            _reject(f"tensor {name} begins at {offset}, no multiple of {alignment}")
        tensors[name] = _placed(name, stated, shape, data_start + offset, header.file_bytes)
    _check_apart(tensors)
    return GGUFHeader(metadata, tensors)


def _placed(name: str, stated: int, shape: tuple[int, ...], start: int, file_bytes: int) -> GGUFTensor:
    if stated not in TYPES:
        known = ", ".join(each.name for each in TYPES.values())
        _reject(f"tensor {name} is of type {OTHER_TYPES.get(stated, stated)}; the known ones are {known}")
    tensor = GGUFTensor(TYPES[stated], shape, start)
    if shape[-1] % tensor.type.elements:
        _reject(
            f"tensor {name}: rows of {shape[-1]} are no whole blocks of {tensor.type.elements} ({tensor.type.name})"
        )
    if start + tensor.nbytes > file_bytes:
        _reject(f"tensor {name} ends at byte {start + tensor.nbytes}, and the file at {file_bytes}: it is cut off")
    return tensor


def _check_apart(tensors: Mapping[str, GGUFTensor]) -> None:
    """Raise GGUFError where two tensors share bytes: a small file could hold any number of large ones."""
    for (ahead, one), (name, other) in pairwise(sorted(tensors.items(), key=lambda item: item[1].start)):
        if other.start < one.start + one.nbytes:
            _reject(f"tensor {name} begins within {ahead}")


class _Header:
    """Reads an open file from its beginning on, never further than it goes."""

    def __init__(self, file: BufferedIOBase) -> None:
        self.file_bytes = file.seek(0, os.SEEK_END)
        self._left = min(self.file_bytes, MAX_HEADER_BYTES)
        self._items_left = MAX_ITEMS
        self._file = file
        file.seek(0)

    def start(self) -> tuple[int, int, int]:
        """The version, the number of tensors and the number of metadata entries."""
        magic = self._bytes(min(4, self._left))
        if magic == b"vers":
            _reject("is a Git LFS pointer, not the file: fetch it with `git lfs pull`")
        if magic != MAGIC:
            _reject(f"does not begin with {MAGIC.decode()}: it is no GGUF file")
        version, tensors, entries = struct.unpack("<IQQ", self._bytes(20))
        if version & 0xFFFF == 0:
            _reject("is in big-endian order: convert it on this machine")
        return version, tensors, entries

    def entry(self) -> tuple[str, object]:
        name = self._text(MAX_NAME_BYTES)
        return name, self._value(self._number("I"))

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape and offset of the next tensor."""
        name = self._text(MAX_NAME_BYTES)
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            _reject(f"tensor {name} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        shape = struct.unpack(f"<{num_dimensions}Q", self._bytes(8 * num_dimensions))
        if not all(shape):
            _reject(f"tensor {name} has a dimension of 0")
        stated, offset = struct.unpack("<IQ", self._bytes(12))
        return name, stated, tuple(reversed(shape)), offset

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._text(MAX_HEADER_BYTES)
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            _reject(f"an entry of the unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self) -> list[object]:
        kind, count = struct.unpack("<IQ", self._bytes(12))
        self._items_left -= count
        if self._items_left < 0:
            _reject(f"an array of {count} items: at most {MAX_ITEMS} are allowed in all arrays together")
        if kind == _STRING:
            if 8 * count > self._left:
                self._cut_off()
            return [self._text(MAX_HEADER_BYTES) for _ in range(count)]
        if kind not in _SCALARS:
            _reject(f"an array of the unknown type {kind}")
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(f"<{code}"))))

    def _number(self, code: str) -> int:
        """A scalar; of all but "f", "d" and "?" an integer."""
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))
        return value  # type: ignore[no-any-return]

    def _text(self, most: int) -> str:
        length = self._number("Q")
        if length > most:
            _reject(f"a text of {length} bytes where at most {most} are allowed")
        return self._bytes(length).decode("utf-8", "replace")

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            self._cut_off()
        self._left -= count
        return self._file.read(count)

    def _cut_off(self) -> NoReturn:
        if self.file_bytes > MAX_HEADER_BYTES:
            _reject(f"a header of more than {MAX_HEADER_BYTES} bytes")
        _reject("ends within its header: it is cut off, or its counts are wrong")


def _reject(problem: str) -> NoReturn:
    raise GGUFError(problem)
