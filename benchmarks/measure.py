"""What a benchmark measures beside the requests: contention, memory, the machine. Standard library only."""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.workload import Work
from loraplex_service.bench.loops import moments
from loraplex_service.bench.records import Record

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def at_rate(work: Sequence[Work], rate: float, seed: int) -> list[Work]:
    """The same requests, `rate` a second on average (Poisson)."""
    arrivals = moments(random.Random(seed), rate, 1.0, len(work))
    return [replace(item, moment=moment) for item, moment in zip(work, arrivals, strict=True)]


def while_saturated(records: Sequence[Record]) -> tuple[int, float]:
    """Output tokens and seconds of a closed loop until its last request was sent: as long as every client had work."""
    began, ended = (moment(record.sent for record in records) for moment in (min, max))
    tokens = sum(count for record in records for moment, count in record.arrivals if moment <= ended)
    return tokens, ended - began


def median_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figure by figure over the repeats, with the range of the throughput."""
    medians = {
        name: statistics.median(run[name] for run in runs) for name, value in runs[0].items() if _is_number(value)
    }
    rates = [run["output_tokens_per_second"] for run in runs]
    return medians | {"output_tokens_per_second_min": min(rates), "output_tokens_per_second_max": max(rates)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- the machine ---------------------------------------------------------------------------------------------------


def process_tree(root: int) -> list[int]:
    """`root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(stat[stat.rindex(")") + 2 :].split()[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def resident_bytes(root: int) -> int:
    """Memory of a process tree, shared pages counted once (PSS)."""
    total = 0
    for pid in process_tree(root):
        try:
            match = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(match.group(1)) * 1024 if match else 0
    return total


def busy_seconds() -> float:
    """CPU seconds that all processes together have used since boot."""
    fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS_PER_SECOND


def cpu_seconds(root: int) -> float:
    """CPU seconds that the living members of a process tree have used."""
    return cpu_seconds_of(process_tree(root))


def cpu_seconds_of(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used; those that have ended count nothing."""
    total = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        total += sum(int(value) for value in stat[stat.rindex(")") + 2 :].split()[11:13])
    return total / TICKS_PER_SECOND


class ContentionMeter:
    """The share of the machine that processes outside our tree used during a `with` block."""

    def __init__(self, root: int) -> None:
        self._root = root
        self.foreign_share = 0.0

    def __enter__(self) -> ContentionMeter:
        self._start = (time.perf_counter(), busy_seconds(), cpu_seconds(self._root))
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._start[0]
        foreign = (busy_seconds() - self._start[1]) - (cpu_seconds(self._root) - self._start[2])
        self.foreign_share = max(0.0, foreign) / seconds / (os.cpu_count() or 1)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    flags = re.search(r"^flags\s*:\s*(.*)", cpuinfo, re.MULTILINE)
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model.group(1) if model else "unknown",
        "cores": os.cpu_count(),
        "memory_gib": round(int(total.group(1)) / 2**20, 1) if total else None,
        "instruction_sets": [flag for flag in known if flags and flag in flags.group(1).split()],
    }
