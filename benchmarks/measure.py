"""Clocks and percentiles: from the moments at which tokens came to the figures of a run. Standard library only."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.workload import Work

TTFT_LIMIT_SECONDS, TPOT_LIMIT_SECONDS = 1.0, 0.1  # what callers wait for
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# generate(work, on_tokens): sends one request, calls on_tokens(n) whenever n more tokens have arrived, and returns the
# token ids at the end.
Generate = Callable[[Work, Callable[[int], None]], Awaitable[list[int]]]


@dataclass
class Record:
    """One request as its sender saw it. Moments in seconds of time.perf_counter."""

    sent: float
    num_prompt: int
    num_output: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (moment, tokens)

    def arrive(self, count: int) -> None:
        """`count` more tokens are here."""
        self.arrivals.append((time.perf_counter(), count))

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first arrival."""
        rest = self.num_output - self.arrivals[0][1]
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / rest if rest > 0 else None


async def closed_loop(
    generate: Generate, work: Sequence[Work], concurrency: int
) -> tuple[list[Record], list[list[int]]]:
    """`concurrency` clients, each of which sends its next request when its last one has ended."""
    todo = iter(enumerate(work))
    records: list[Record] = []
    tokens: list[list[int]] = [[] for _ in work]

    async def client() -> None:
        for index, item in todo:
            record = Record(time.perf_counter(), len(item.prompt), item.output)
            tokens[index] = await generate(item, record.arrive)
            received = sum(count for _, count in record.arrivals)
            if received != item.output:
                raise RuntimeError(f"asked for {item.output} tokens, got {received}")
            records.append(record)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return records, tokens


async def open_loop(generate: Generate, work: Sequence[Work]) -> tuple[list[Record], list[list[int]]]:
    """Each request when its moment has come, whatever became of others.

    A request counts from its own moment, even if the sender was late.
    """
    start = time.perf_counter()

    async def client(item: Work) -> tuple[Record, list[int]]:
        moment = start + item.moment
        await asyncio.sleep(moment - time.perf_counter())
        record = Record(moment, len(item.prompt), item.output)
        tokens = await generate(item, record.arrive)
        received = sum(count for _, count in record.arrivals)
        if received != item.output:
            raise RuntimeError(f"asked for {item.output} tokens, got {received}")
        return record, tokens

    answers = await asyncio.gather(*(client(item) for item in work))
    return [record for record, _ in answers], [tokens for _, tokens in answers]


async def drive(
    generate: Generate, work: Sequence[Work], concurrency: int | None
) -> tuple[list[Record], list[list[int]]]:
    """A closed loop of so many clients; None: an open loop."""
    if concurrency is None:
        return await open_loop(generate, work)
    return await closed_loop(generate, work, concurrency)


def at_rate(work: Sequence[Work], rate: float, seed: int) -> list[Work]:
    """The same requests, `rate` a second on average (Poisson)."""
    rng = random.Random(seed)
    moments = itertools.accumulate(rng.expovariate(rate) for _ in work)
    return [replace(item, moment=moment) for item, moment in zip(work, moments, strict=True)]


def percentile(values: Iterable[float], share: float) -> float:
    """Linear interpolation between the nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Throughput and latency of one repeat."""
    wall = max(record.arrivals[-1][0] for record in records) - min(record.sent for record in records)
    ttft = [record.ttft for record in records]
    tpot = [value for record in records if (value := record.tpot) is not None]
    output = sum(record.num_output for record in records)
    summary = {
        "wall_seconds": wall,
        "output_tokens_per_second": output / wall,
        "total_tokens_per_second": (output + sum(record.num_prompt for record in records)) / wall,
    }
    for name, values in (("ttft", ttft), ("tpot", tpot)):
        for share in (0.5, 0.9, 0.99):
            summary[f"{name}_p{share * 100:.0f}_seconds"] = percentile(values, share) if values else float("nan")
    return summary


def summarise_traffic(records: Sequence[Record]) -> dict[str, float]:
    """The same, and how many requests had their tokens in time."""
    summary = summarise(records)
    in_time = sum(record.ttft <= TTFT_LIMIT_SECONDS and (record.tpot or 0) <= TPOT_LIMIT_SECONDS for record in records)
    return summary | {
        "share_in_time": in_time / len(records),
        "requests_in_time_per_second": in_time / summary["wall_seconds"],
    }


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
