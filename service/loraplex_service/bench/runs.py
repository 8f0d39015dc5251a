"""One run of a benchmark: requests are sent, their sender is watched, and figures come out."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from loraplex_service.bench.loops import Generate, drive
from loraplex_service.bench.plans import Request
from loraplex_service.bench.records import Record, percentile, percentiles, summarise_traffic

TICK_SECONDS = 0.01
# Beyond these the sender is what is measured.
BUSY_SHARE = 0.85  # of one core
LATE_SECONDS = 0.02


class Watch:
    """How busy the process of the sender was during a block, and by how much its event loop came late."""

    def __init__(self) -> None:
        self._late: list[float] = []

    async def __aenter__(self) -> "Watch":
        self._start = (time.perf_counter(), time.process_time())
        self._ticks = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticks.cancel()
        seconds = time.perf_counter() - self._start[0]
        self.cpu_share = (time.process_time() - self._start[1]) / seconds
        self.late_p99 = percentile(self._late, 0.99) if self._late else 0.0

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._late.append(time.perf_counter() - due)


async def run(
    door: Generate[Request], work: Sequence[Request], streams: int | None, ttft_limit: float, tpot_limit: float
) -> dict[str, Any]:
    """The figures of one run. streams: clients of a closed loop; None: an open loop."""
    async with Watch() as watch:
        records, _ = await drive(door, work, streams)
    good = [record for record in records if not record.error]
    figures: dict[str, Any] = {
        "requests": len(records),
        "failed": len(records) - len(good),
        "errors": _counted(record.error for record in records if record.error),
        "sender": {
            "cpu_share": watch.cpu_share,
            "late_p99_seconds": max(watch.late_p99, percentile([record.late for record in records], 0.99)),
        },
    }
    figures["sender"]["is_the_limit"] = is_the_limit(**figures["sender"])
    if not good:
        return figures
    summary = summarise_all(good, ttft_limit, tpot_limit)
    summary["share_in_time"] *= len(good) / len(records)  # who failed was not in time
    return figures | summary


def is_the_limit(cpu_share: float, late_p99_seconds: float) -> bool:
    """Whether figures say more of the sender than of the server."""
    return cpu_share > BUSY_SHARE or late_p99_seconds > LATE_SECONDS


def summarise_all(records: Sequence[Record], ttft_limit: float, tpot_limit: float) -> dict[str, float]:
    """Every figure of requests that succeeded."""
    summary = summarise_traffic(records, ttft_limit, tpot_limit)
    return summary | {
        "requests_per_second": len(records) / summary["wall_seconds"],
        "prompt_tokens": sum(record.num_prompt for record in records),
        "output_tokens": sum(record.num_output for record in records),
        **percentiles("gap", [gap for record in records for gap in record.gaps]),
        **percentiles("e2e", [record.duration for record in records]),
    }


def _counted(errors: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    return counts
