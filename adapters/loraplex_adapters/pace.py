"""Limits how fast adapters are read beside steps that need the same cores and the same interpreter."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

# Work between two rests: about what one kernel of a step takes, so that nothing in a step waits for long.
WORK_SECONDS = 0.0003

# Of the share, while nobody waits for any load: they are ahead of their requests.
AHEAD = 0.25

# Of the time in which a load that somebody waits for got less than its share, since others had the cores, so much it
# makes up for. Without that each pause, however short, ends with another wait for a core: such loads took twice as
# long on a machine that was busy with other work, and the gaps between the tokens beside them were the same.
MADE_UP_SECONDS = 0.05

# Called between small pieces of work, in the thread that does it; may sleep.
Rest = Callable[[], None]

_T = TypeVar("_T")


class Pace:
    """Holds all loads together to a share of one core while requests run. Without requests there is no limit.

    A step waits for the slowest of its threads, and after each of its kernels for Python's interpreter: work that takes
    a core or the interpreter for a while holds up every request, at whatever priority it runs. Short pieces with pauses
    between them cannot. While somebody waits for a load, all of them go on at the whole share, since the one that is
    waited for may come behind others; else at a part of it.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """share: of one core, up to 1; 1: no limit."""
        self._share = share
        self._clock = clock
        self._lock = threading.Lock()
        self._rested_at = 0.0  # by the clock: when the work that was done so far has been paid for
        self._part, self._made_up = AHEAD, 0.0  # of the share; of what it was kept from
        self._free = threading.Event()
        self._free.set()

    def steps(self, running: bool) -> None:
        """Note whether requests run from now on. Resting loads go on at once when none does."""
        if running == self._free.is_set():
            self._free.clear() if running else self._free.set()

    def hurry(self, awaited: bool) -> None:
        """Note whether somebody waits for a load from now on. A pause that has begun is not shortened."""
        self._part, self._made_up = (1.0, MADE_UP_SECONDS) if awaited else (AHEAD, 0.0)

    def begin(self, spent: Callable[[], float] = time.thread_time) -> Rest:
        """Begin a load in its own thread. Returns a function to call between pieces of work.

        spent: its CPU seconds so far.
        """
        before = spent()
        with self._lock:
            self._rested_at = max(self._rested_at, self._clock())

        def rest() -> None:
            nonlocal before
            now = spent()
            if now - before >= WORK_SECONDS:
                self._free.wait(self._pause_after(now - before))
                before = spent()

        return rest

    def _pause_after(self, worked: float) -> float:
        """The pause after a piece of work, in seconds."""
        if self._share >= 1.0 or self._free.is_set():
            return 0.0
        with self._lock:
            now = self._clock()
            since = max(now - worked - self._made_up, self._rested_at)
            self._rested_at = since + worked / (self._share * self._part)
            return max(0.0, self._rested_at - now)


def no_rest() -> None:
    """Do nothing: the pace of work that delays no request."""


def resting(items: Iterable[_T], rest: Rest) -> Iterator[_T]:
    """Yield the items, with a rest after each."""
    for item in items:
        yield item
        rest()
