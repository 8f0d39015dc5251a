"""Memory that is provided ahead of its first use."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from loraplex_engine.checkpoint.memory import empty_matrix, populate

PAGES = 64


def resident_bytes(address: int) -> int:
    """Of the mapping that holds an address: what lies in physical memory."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, _, end = first.partition("-")
            holds = int(begin, 16) <= address < int(end, 16)
        elif holds and first == "Rss:":
            return int(rest.split()[0]) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_pages_are_there_before_they_are_written_to_and_keep_what_they_hold() -> None:
    matrix = empty_matrix((8 << 20,), torch.uint8, torch.device("cpu"))
    matrix[5] = 7
    before = resident_bytes(matrix.data_ptr() + matrix.nbytes // 2)
    populate([matrix]).join()
    assert before < matrix.nbytes <= resident_bytes(matrix.data_ptr() + matrix.nbytes // 2)
    assert matrix[5] == 7


def test_what_lies_beside_a_tensor_is_left_alone() -> None:
    memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    populate([whole[100:200], whole[:0]]).join()  # less than a page, and nothing at all
    assert not whole.any()
