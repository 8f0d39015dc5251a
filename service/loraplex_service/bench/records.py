"""Clocks and percentiles: from the moments at which tokens came to the figures of a run. Standard library only."""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TTFT_LIMIT_SECONDS, TPOT_LIMIT_SECONDS = 1.0, 0.1  # what callers wait for


@dataclass
class Record:
    """One request as its sender saw it. Moments in seconds of time.perf_counter."""

    sent: float
    num_prompt: int
    num_output: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (moment, tokens)
    late: float = 0.0  # seconds between its moment and the sender's turn to send it; sent is its moment
    error: str = ""  # why it failed, where others go on

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

    @property
    def duration(self) -> float:
        """Seconds from sending to the last token."""
        return self.arrivals[-1][0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one arrival and the next."""
        return [after - before for (before, _), (after, _) in itertools.pairwise(self.arrivals)]


def percentile(values: Iterable[float], share: float) -> float:
    """Linear interpolation between the nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median and the tail of a latency, by name."""
    return {
        f"{name}_p{share * 100:.0f}_seconds": percentile(values, share) if values else float("nan")
        for share in (0.5, 0.9, 0.99)
    }


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Throughput and latency of one repeat."""
    wall = max(record.arrivals[-1][0] for record in records) - min(record.sent for record in records)
    output = sum(record.num_output for record in records)
    return {
        "wall_seconds": wall,
        "output_tokens_per_second": output / wall,
        "total_tokens_per_second": (output + sum(record.num_prompt for record in records)) / wall,
        **percentiles("ttft", [record.ttft for record in records]),
        **percentiles("tpot", [value for record in records if (value := record.tpot) is not None]),
    }


def summarise_traffic(
    records: Sequence[Record], ttft_limit: float = TTFT_LIMIT_SECONDS, tpot_limit: float = TPOT_LIMIT_SECONDS
) -> dict[str, float]:
    """The same, and how many requests had their tokens in time."""
    summary = summarise(records)
    in_time = sum(record.ttft <= ttft_limit and (record.tpot or 0) <= tpot_limit for record in records)
    return summary | {
        "share_in_time": in_time / len(records),
        "requests_in_time_per_second": in_time / summary["wall_seconds"],
    }
