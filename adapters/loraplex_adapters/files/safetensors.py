"""The header of a safetensors file, read and checked within limits of our own.

Layout: 8 bytes little-endian header length, the header as JSON, then the data. The header maps each name to a dtype, a
shape and the half-open byte range in the data. Source: the safetensors format description.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import NoReturn

import msgspec

from loraplex_adapters.errors import AdapterRejected

MAX_HEADER_BYTES = 16 << 20  # 37,000 tensors of a large mixture of experts need 6 MiB
MAX_TENSORS = 1 << 16
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_NO_FLOAT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
_ITEM_BYTES = FLOAT_BYTES | _NO_FLOAT_BYTES


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header's entry of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # [begin, end) in the data


@dataclass(frozen=True, slots=True)
class Header:
    """A header, no two of whose tensors have a byte in common; in safetensors they tile the data, without gaps."""

    tensors: Mapping[str, TensorEntry]
    data_start: int  # offset of the data in the file
    data_bytes: int


def read_header(file: BufferedIOBase) -> Header:
    """Read and check the header of an open file. Raises AdapterRejected saying what is wrong with it."""
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    if prefix.startswith(b"version "):
        _reject("this is a Git LFS pointer, not the file: fetch it with `git lfs pull`")
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > file_bytes - 8:
        _reject("it is too short for its header: not a safetensors file, or cut off")
    if header_bytes > MAX_HEADER_BYTES:
        _reject(f"a header of {header_bytes} bytes: at most {MAX_HEADER_BYTES} are allowed")
    tensors = _decode(file.read(header_bytes))
    data_bytes = file_bytes - 8 - header_bytes
    for name, entry in tensors.items():
        _check_entry(name, entry)
    _check_tiling(tensors, data_bytes)
    return Header(tensors, 8 + header_bytes, data_bytes)


def _decode(raw: bytes) -> dict[str, TensorEntry]:
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        _reject(f"more than {MAX_TENSORS} tensors")
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)  # text for people
        if len(entries) > MAX_TENSORS:
            _reject(f"more than {MAX_TENSORS} tensors")
        decoder = msgspec.json.Decoder(TensorEntry)
        return {name: decoder.decode(entry) for name, entry in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterRejected([f"adapter_model.safetensors: its header is not valid: {error}"]) from error


def _check_entry(name: str, entry: TensorEntry) -> None:
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        _reject(f"the tensor name {name[:80]!r} is longer than {MAX_NAME_LENGTH} characters or not printable")
    if entry.dtype not in _ITEM_BYTES:
        _reject(f"{name}: unknown dtype {entry.dtype[:20]!r}")
    if len(entry.shape) > MAX_DIMENSIONS or min(entry.shape, default=0) < 0:
        _reject(f"{name}: shape {list(entry.shape)[:20]} is not valid")
    begin, end = entry.data_offsets
    needed = math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
    if end - begin != needed:
        _reject(f"{name}: {end - begin} bytes for {entry.dtype} {list(entry.shape)}, which needs {needed}")


def _check_tiling(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Check that every byte belongs to exactly one tensor, so that no two readers can read a file differently."""
    covered = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != covered:
            _reject(f"{name}: its data begins at {begin}, but {covered} is where the tensor before it ends")
        covered = end
    if covered != data_bytes:
        _reject(f"its tensors need {covered} bytes of data, it has {data_bytes}: cut off, or something was appended")


def _reject(problem: str) -> NoReturn:
    raise AdapterRejected([f"adapter_model.safetensors: {problem}"])
