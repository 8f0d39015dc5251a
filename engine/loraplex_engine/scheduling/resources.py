"""What a request needs before it can run, and others prepare: its adapter on the device, its form, its prefix.

Each kind has a `Preparer`, which works beside the steps, and a `WaitingRoom` for the requests that it keeps waiting.
Nobody else waits for them, and what fails, fails alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

from loraplex_engine.scheduling.request import Request

# A request that waits for what others use gets it after this long, at their cost.
PATIENCE_SECONDS = 2.0


class NeverReadyError(Exception):
    """What a request needs cannot be had. The message says why to its caller."""

    def __init__(self, problem: str, reason: str = "") -> None:
        super().__init__(problem)
        self.reason = reason  # the kind of problem: a name of loraplex.v1.ErrorReason, or ""


class Preparer(Protocol):
    """Prepares one kind of thing that requests need. No method waits: the work is done in threads."""

    outlasts_blocks: bool = True  # False: who loses its blocks, or finds none, needs it anew. Such ones come last

    @property
    def changes(self) -> int:
        """Grows whenever something that was not ready might be ready now, or might never be."""

    def key(self, request: Request) -> Hashable | None:
        """The thing of this kind that the request names; None: it needs none."""

    def give(self, request: Request) -> bool:
        """Give the request what it needs, to hold until `take_back`. False: it is not ready, ask again.

        Raises NeverReadyError.
        """

    def take_back(self, request: Request) -> None:
        """Note that the request no longer needs what it holds."""

    def forget(self, key: Hashable) -> None:
        """Note that no request waits for this thing any more. By itself, nothing was begun for them alone."""
        return None

    def hurry(self, request: Request) -> None:
        """Make way for a request that has waited long. By itself, nothing that others use is in its way."""
        return None

    def limit(self, request: Request) -> tuple[float, NeverReadyError] | None:
        """The longest wait in seconds, and what ends it; None: the request waits for ever."""
        return None


class WaitingRoom:
    """The requests that wait for one preparer. Those that need the same thing wait in one line, first come first."""

    def __init__(self, preparer: Preparer, clock: Callable[[], float]) -> None:
        self._preparer = preparer
        self.outlasts_blocks = preparer.outlasts_blocks
        self._clock = clock
        self._waits: dict[int, tuple[Request, float]] = {}  # who waits, and since when, by arrival number
        self._lines: dict[Hashable, dict[int, Request]] = {}
        self._deadlines: list[tuple[float, int, NeverReadyError]] = []  # of arrival numbers, some of which have left
        self._changes_seen = -1

    def __len__(self) -> int:
        return len(self._waits)

    def provide(self, request: Request) -> bool:
        """Give the request what it needs. False: it waits here for it. Raises NeverReadyError."""
        key = self._preparer.key(request)
        if key is None:
            return True
        if key not in self._lines and self._preparer.give(request):  # those that already wait for it come first
            return True
        self._enter(request, key)
        return False

    def waited(self) -> Iterator[tuple[Request, NeverReadyError | None]]:
        """The requests whose wait is over, each with the reason why it gets nothing, or None: it has what it needs.

        The caller lets each `leave` before it asks for the next.
        """
        self._hurry_for_the_oldest()
        if self._preparer.changes != self._changes_seen:
            self._changes_seen = self._preparer.changes
            for line in list(self._lines.values()):
                yield from self._served(line)
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, problem = heapq.heappop(self._deadlines)
            if number in self._waits:
                yield self._waits[number][0], problem

    def leave(self, request: Request) -> None:
        """Let go of a request that waits here, and note how long it did."""
        key = self._preparer.key(request)
        line, number = self._lines[key], request.order[1]
        del line[number]
        if not line:
            del self._lines[key]
            self._preparer.forget(key)
        _, since = self._waits.pop(number)
        request.waits[key] = self._clock() - since

    def release(self, request: Request) -> None:
        """Take back what the request was given."""
        if self._preparer.key(request) is not None:
            self._preparer.take_back(request)

    def _enter(self, request: Request, key: Hashable) -> None:
        now, number = self._clock(), request.order[1]
        self._waits[number] = (request, now)
        self._lines.setdefault(key, {})[number] = request
        limit = self._preparer.limit(request)
        if limit is not None:
            seconds, problem = limit
            heapq.heappush(self._deadlines, (now + seconds, number, problem))

    def _served(self, line: dict[int, Request]) -> Iterator[tuple[Request, NeverReadyError | None]]:
        """The requests of one line that get what they wait for, or never will."""
        for request in list(line.values()):
            try:
                if not self._preparer.give(request):
                    return
            except NeverReadyError as problem:
                yield request, problem
            else:
                yield request, None

    def _hurry_for_the_oldest(self) -> None:
        """Make way for the request that waits longest, lest things in constant use starve it."""
        line = next(iter(self._lines.values()), None)
        if line is None:
            return
        oldest = next(iter(line.values()))
        if self._clock() - oldest.arrival_time > PATIENCE_SECONDS:
            self._preparer.hurry(oldest)
