import json
from io import BytesIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, Header, TensorEntry, read_header

GOOD = save({"b": torch.ones(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16)}, metadata={"format": "pt"})


def read(content: bytes) -> Header:
    return read_header(BytesIO(content))


def file_of(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problem_of(content: bytes) -> str:
    with pytest.raises(AdapterRejected) as caught:
        read(content)
    (problem,) = caught.value.problems
    return problem


def test_the_header_that_the_safetensors_package_writes_is_read() -> None:
    header = read(GOOD)
    assert set(header.tensors) == {"a", "b"}
    assert header.tensors["b"].shape == (2, 3)
    assert header.tensors["a"].dtype == "BF16"
    assert header.data_start + header.data_bytes == len(GOOD)


def test_a_file_without_metadata_or_tensors_is_read() -> None:
    assert read(file_of({})) == Header({}, 10, 0)


def test_tensors_may_be_listed_in_any_order() -> None:
    header = read(file_of({"late": entry(8, 12, [1]), "early": entry(0, 8, [2])}, bytes(12)))
    assert header.tensors["late"] == TensorEntry("F32", (1,), (8, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"fake weights", "too short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "too short"),
        (GOOD[:-1], "cut off"),
        (GOOD + b"\0", "appended"),
        (file_of(b"[]"), "not valid"),
        (file_of(b"{"), "not valid"),
        (file_of(b"\xff{}"), "not valid"),
        (file_of({"a": 1}), "not valid"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}), "not valid"),
        (file_of({"a": entry(0, 4, [1]) | {"more": 1}}, bytes(4)), "not valid"),
        (file_of({"a": entry(0, 4, [1], "F33")}, bytes(4)), "unknown dtype"),
        (file_of({"a": entry(0, 4, [2])}, bytes(4)), "needs 8"),
        (file_of({"a": entry(4, 0, [-1])}, bytes(4)), "not valid"),
        (file_of({"a": entry(0, 4, [-1, -1])}, bytes(4)), "not valid"),
        (file_of({"a": entry(0, 4, [1] * 9)}, bytes(4)), "not valid"),
        (file_of({"a": entry(0, 4, [1 << 62, 1 << 62])}, bytes(4)), "needs"),
        (file_of({"a": entry(-4, 0, [1])}, bytes(4)), "begins at -4"),
        (file_of({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)), "begins at 0"),
        (file_of({"a": entry(4, 8, [1])}, bytes(8)), "begins at 4"),
        (file_of({"a" * 600: entry(0, 4, [1])}, bytes(4)), "tensor name"),
        (file_of({"a\n": entry(0, 4, [1])}, bytes(4)), "tensor name"),
    ],
)
def test_a_broken_header_is_refused(content: bytes, message: str) -> None:
    assert message in problem_of(content)


def test_a_huge_header_is_refused_before_it_is_read() -> None:
    class Unreadable(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size == 8, "only the length may be read"
            return super().read(size)

    content = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(MAX_HEADER_BYTES + 1)
    with pytest.raises(AdapterRejected, match="at most"):
        read_header(Unreadable(content))


def test_a_header_with_too_many_tensors_is_refused() -> None:
    bomb = b"{" + b",".join(b'"%d":{"data_offsets":[0,0]}' % i for i in range(MAX_TENSORS + 1)) + b"}"
    assert "more than" in problem_of(file_of(bomb))


def test_a_header_with_too_many_entries_of_nothing_is_refused() -> None:
    bomb = b"{" + b",".join(b'"%d":0' % i for i in range(MAX_TENSORS + 1)) + b"}"
    assert "more than" in problem_of(file_of(bomb))


@given(st.data())
def test_damaged_bytes_are_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read(bytes(content))
    except AdapterRejected:
        return
    assert header.data_start + header.data_bytes == len(content)


@given(st.binary(max_size=64))
def test_arbitrary_bytes_as_a_header_are_refused(raw: bytes) -> None:
    if raw.strip() != b"{}":
        assert problem_of(file_of(raw))
