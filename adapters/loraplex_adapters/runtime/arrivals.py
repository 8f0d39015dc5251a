"""Adapters that are read while they are uploaded, so that little is left to do after the last byte."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.files.growing import Growth
from loraplex_adapters.runtime.weights import LoadedAdapter

# Reads an adapter, from a number for the log, its directory and the growth of its weights.
ReadGrowing = Callable[[int, Path, Growth], LoadedAdapter]


@dataclass(frozen=True, slots=True)
class _Arrival:
    growth: Growth
    reading: Future[LoadedAdapter]


class Arrivals:
    """The uploads under way, by number. Called from one thread; the reading happens in others.

    They are the threads of uploads alone: one that comes slowly keeps another from being read ahead, and no load.
    """

    def __init__(self, read: ReadGrowing, threads: Executor) -> None:
        self._read = read
        self._threads = threads
        self._arrivals: dict[int, _Arrival] = {}

    def __len__(self) -> int:
        return len(self._arrivals)

    def note(self, number: int, directory: Path, size: int, num_bytes: int) -> None:
        """Note how much of the weights is there, of `size` bytes. The reading begins with the first note."""
        if number not in self._arrivals:
            growth = Growth(size)
            reading = self._threads.submit(self._read, number, directory, growth)
            self._arrivals[number] = _Arrival(growth, reading)
        self._arrivals[number].growth.reach(num_bytes)

    def take(self, number: int) -> Future[LoadedAdapter] | None:
        """The reading of an upload that is whole, for whoever wants its adapter; None: it has not begun."""
        arrival = self._arrivals.pop(number, None)
        if arrival is None or arrival.reading.cancel():
            return None
        arrival.growth.reach(arrival.growth.size)
        return arrival.reading

    def drop(self, number: int) -> None:
        """Forget an upload and what was read of it. One that was taken, or never noted, is not an error."""
        arrival = self._arrivals.pop(number, None)
        if arrival is not None:
            arrival.reading.cancel()
            arrival.growth.end()

    def close(self) -> None:
        """Forget all uploads, and end the threads."""
        for number in list(self._arrivals):
            self.drop(number)
        self._threads.shutdown(wait=False, cancel_futures=True)
