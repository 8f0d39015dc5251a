"""The header of GGUF files: what is there is found, and files that lie are refused quickly and by name."""

from __future__ import annotations

import io
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_adapters.files.gguf import GGUFError, hub_parts, parts_of, read_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(entries: list[bytes], stored: list[bytes], data: bytes = b"", **counts: Any) -> bytes:
    numbers = {"version": 3, "tensors": len(stored), "count": len(entries)} | counts
    header = b"GGUF" + struct.pack("<IQQ", *numbers.values()) + b"".join([*entries, *stored])
    return header + bytes(-len(header) % 32) + data


NAME = entry("general.architecture", 8, text("llama"))
LIST = entry("numbers", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 7))
TEXTS = entry("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("東"))
GOOD = file([NAME, LIST, TEXTS], [tensor("w", (32, 2), 8, 0)], bytes(68))


def problem(data: bytes) -> str:
    with pytest.raises(GGUFError) as caught:
        read_gguf(io.BytesIO(data))
    return str(caught.value)


def test_metadata_and_tensors_are_read() -> None:
    header = read_gguf(io.BytesIO(GOOD))
    assert header.metadata == {"general.architecture": "llama", "numbers": [-1, 0, 7], "texts": ["a", "東"]}
    found = header.tensors["w"]
    assert (found.type.name, found.shape, found.row_bytes, found.nbytes) == ("Q8_0", (2, 32), 34, 68)
    assert found.start + found.nbytes == len(GOOD)


@settings(deadline=None)
@given(cut=st.integers(0, len(GOOD) - 1))
def test_a_file_that_is_cut_off_anywhere_is_refused(cut: int) -> None:
    problem(GOOD[:cut])


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(place: int, byte: int) -> None:
    changed = bytearray(GOOD)
    changed[place] = byte
    with suppress(GGUFError):
        read_gguf(io.BytesIO(bytes(changed)))


HUGE = 1 << 62
LIES = {
    "tensors": (file([NAME], [], tensors=HUGE), "tensors and 1 entries: at most"),
    "entries": (file([NAME], [], count=HUGE), "entries: at most"),
    "more entries than there are": (file([NAME], [], count=9), "ends within its header"),
    "text": (file([struct.pack("<Q", HUGE)], []), "a text of"),
    "array": (file([entry("a", 9, struct.pack("<IQ", 4, HUGE))], []), "items: at most"),
    "array within limits": (file([entry("a", 9, struct.pack("<IQ", 4, 1 << 20))], []), "ends within its header"),
    "texts": (file([entry("a", 9, struct.pack("<IQ", 8, 1 << 20))], []), "ends within its header"),
    "nested": (file([entry("a", 9, struct.pack("<IQ", 9, 1))], []), "array of the unknown type 9"),
    "kind": (file([entry("a", 77, b"")], []), "unknown type 77"),
    "offset": (file([], [tensor("w", (32,), 0, HUGE)]), "tensor w ends at"),
    "shape": (file([], [tensor("w", (1 << 40, 1 << 40), 0, 0)]), "tensor w ends at"),
    "dimensions": (file([], [tensor("w", (1,) * 9, 0, 0)]), "9 dimensions"),
    "empty": (file([], [tensor("w", (0, 2), 0, 0)]), "dimension of 0"),
    "half a block": (file([], [tensor("w", (33,), 8, 0)], bytes(99)), "no whole blocks of 32"),
    "odd offset": (file([], [tensor("w", (8,), 0, 4)], bytes(99)), "no multiple of 32"),
    "type": (file([], [tensor("w", (256,), 19, 0)], bytes(999)), "of type IQ1_S; the known ones are F32"),
    "alignment": (file([entry("general.alignment", 4, struct.pack("<I", 0))], []), "general.alignment is 0"),
    "twice": (file([NAME, NAME], []), "there twice"),
    "shared bytes": (
        file([], [tensor(name, (8,), 0, offset) for name, offset in (("w", 32), ("v", 0), ("u", 32))], bytes(99)),
        "tensor u begins within w",
    ),
    "tensor twice": (file([], [tensor("w", (8,), 0, 0)] * 2, bytes(99)), "tensor w is there twice"),
    "version": (file([], [], version=1), "version 1"),
    "big-endian": (file([], [], version=0x3000000), "big-endian"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "other": (b"PK\x03\x04" * 9, "no GGUF file"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_without_room_for_it(name: str) -> None:
    data, said = LIES[name]
    tracemalloc.start()
    try:
        assert said in problem(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_parts_of_a_split_model_follow_from_the_first() -> None:
    found = parts_of(Path("/m/x-00001-of-00003.gguf"))
    assert [part.name for part in found] == [f"x-0000{place}-of-00003.gguf" for place in (1, 2, 3)]
    assert parts_of(Path("/m/x.gguf")) == [Path("/m/x.gguf")]


def test_another_part_is_no_model() -> None:
    with pytest.raises(GGUFError, match=r"part 2 of 3: name the first one, x-00001-of-00003\.gguf"):
        parts_of(Path("x-00002-of-00003.gguf"))


def test_a_repository_may_be_followed_by_a_file() -> None:
    assert hub_parts("owner/name/Q4/x.gguf") == ("owner/name", "Q4/x.gguf")
    assert hub_parts("owner/name") == ("owner/name", None)


@pytest.mark.parametrize(
    "file", ["../x.gguf", "a/../x.gguf", "./x.gguf", "/etc/x.gguf", "a//x.gguf", "*.gguf", "[x].gguf"]
)
def test_what_is_no_plain_path_within_a_repository_is_no_file_of_it(file: str) -> None:
    assert hub_parts(f"owner/name/{file}") == (f"owner/name/{file}", None)
