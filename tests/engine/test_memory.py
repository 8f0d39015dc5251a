"""What the process does with its own memory: pages provided ahead of their first use, and kept after the last."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.memory import empty_matrix, populate

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


FAULTS_OF_A_SECOND_USE = """
import resource, sys, torch
from engine.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for use in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", FAULTS_OF_A_SECOND_USE, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 100 < faults("given back")
