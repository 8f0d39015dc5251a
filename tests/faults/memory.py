"""How much memory the processes of a server hold, and how fast that grows with what they are asked."""

import re
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Final

MIB: Final = 1 << 20
WARM_UP: Final = 1 / 3  # of all requests: pools, caches and the allocator's arenas fill up first
REQUESTS: Final = 1000  # that a slope is given for


@dataclass
class Growth:
    """Anonymous memory of one process, in MiB, against the requests that it has seen."""

    points: list[tuple[int, float]] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return self.points[-1][0] if self.points else 0

    def slope(self) -> float:
        """MiB per 1,000 requests once warm: the median over all pairs of samples (Theil and Sen).

        An allocator takes memory in steps and gives some of it back. Neither moves a median, and a leak does.
        """
        warm = [(served, mib) for served, mib in self.points if served >= self.num_requests * WARM_UP]
        return median(
            REQUESTS * (after - before) / (late - early)
            for (early, before), (late, after) in combinations(warm, 2)
            if late > early
        )


def anonymous_mib(pid: int) -> float:
    """RssAnon and VmSwap: what a process has written to and cannot drop, in memory or swapped out."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", status, re.MULTILINE)) / 1024
