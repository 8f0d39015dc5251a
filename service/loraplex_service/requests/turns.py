"""Turns for long work on texts: a few at a time, the least served tenant next, and a limit on what waits."""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from loraplex_service.errors import Unavailable

T = TypeVar("T")
Pieces = Generator[None, None, T]  # work that pauses after each piece of it, and returns what it comes to

SMALLEST = 4096  # the least size that work counts as: many small pieces take time, too
NICER = 5  # niceness of the threads above that of the event loop's: a third of a core that both want


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """Sizes are bytes of text."""

    at_once: int
    size_at_once: int  # of large work that runs together; a single piece may be larger
    size_in_all: int  # of work that runs or waits

    def is_large(self, size: int) -> bool:
        """Whether the work is large. Large work leaves one place free, so that other work need not wait for its end."""
        return 8 * size > self.size_at_once


@dataclass(slots=True)
class _Tenant:
    served: float  # by its weight, so far
    held: int = 0  # size of its work that runs or waits
    waiting: "deque[_Work]" = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Work:
    tenant: str
    size: int
    cost: float
    turn: asyncio.Future[None]


class Turns:
    """Gives turns to tenants. For one event loop.

    One tenant may fill the queue. Other tenants are still let in, up to their shares of it, so the most that can wait
    is twice the limit.
    """

    def __init__(self, what: str, limits: TurnLimits) -> None:
        """`what`: begins the error message, such as "long texts cannot be tokenised"."""
        self._what = what
        self._limits = limits
        self._tenants: dict[str, _Tenant] = {}  # tenants with work that runs or waits
        self._held = 0
        self._running: list[_Work] = []
        self._threads = ThreadPoolExecutor(limits.at_once, "long-text", initializer=_give_way)

    @asynccontextmanager
    async def turn(self, tenant: str, weight: float, size: int) -> AsyncIterator[None]:
        """Wait for a turn; the block is the turn. Raises Unavailable (OVERLOADED) at once where too much waits."""
        work = await self._begin(tenant, weight, size)
        try:
            yield
        finally:
            self._end(work)

    async def in_thread(self, tenant: str, weight: float, size: int, do: Callable[[], T]) -> T:
        """Run work in a turn, in a thread that leaves the cores to the event loop: work of a library that gives up the
        interpreter lock for most of it.

        A cancelled caller leaves the queue, but does not stop work that has begun.
        """
        work = await self._begin(tenant, weight, size)
        doing = asyncio.get_running_loop().run_in_executor(self._threads, do)

        def ended(future: asyncio.Future[T]) -> None:
            self._end(work)
            future.exception()  # seen, even if its caller went away

        doing.add_done_callback(ended)
        try:
            return await asyncio.shield(doing)
        finally:
            del doing  # or what it raises, and all that was at hand there, waits for the collector of cycles

    async def in_pieces(self, tenant: str, weight: float, size: int, work: "Pieces[T]") -> T:
        """Run work in a turn, on the event loop, which serves others between two pieces of it.

        For work that holds the interpreter lock: a thread with it that gets no processor would keep the loop from its
        own.
        """
        async with self.turn(tenant, weight, size):
            while True:
                try:
                    next(work)
                except StopIteration as end:
                    result: T = end.value
                    return result
                await asyncio.sleep(0)

    async def _begin(self, tenant: str, weight: float, size: int) -> _Work:
        size = max(size, SMALLEST)
        self._check_room(tenant, size)
        own = self._tenants.get(tenant)
        if own is None:
            own = _Tenant(min((other.served for other in self._tenants.values()), default=0.0))
            self._tenants[tenant] = own
        work = _Work(tenant, size, size / weight, asyncio.get_running_loop().create_future())
        own.held += size
        self._held += size
        own.waiting.append(work)
        self._give_turns()
        try:
            await work.turn
        except BaseException:
            self._end(work)
            raise
        return work

    def _check_room(self, tenant: str, size: int) -> None:
        limit, own = self._limits.size_in_all, self._tenants.get(tenant, _Tenant(0.0))
        share = limit / (len(self._tenants) + (tenant not in self._tenants))
        all_fits = not self._held or self._held + size <= limit
        if not all_fits and (own.held + size > share or self._held + size > 2 * limit):
            raise Unavailable("OVERLOADED", f"{self._what} now: too much waits. Try again, or another replica")

    def _give_turns(self) -> None:
        while len(self._running) < self._limits.at_once:
            ready = [one for one in self._tenants.values() if one.waiting and self._may_run(one.waiting[0])]
            if not ready:
                return
            tenant = min(ready, key=lambda one: one.served)
            work = tenant.waiting.popleft()
            tenant.served += work.cost
            self._running.append(work)
            if not work.turn.done():  # its caller may have gone just now
                work.turn.set_result(None)

    def _may_run(self, work: _Work) -> bool:
        large = [one.size for one in self._running if self._limits.is_large(one.size)]
        if not large or not self._limits.is_large(work.size):
            return True
        return len(large) < self._limits.at_once - 1 and sum(large) + work.size <= self._limits.size_at_once

    def _end(self, work: _Work) -> None:
        own = self._tenants[work.tenant]
        if work in own.waiting:
            own.waiting.remove(work)
        else:
            self._running.remove(work)
        own.held -= work.size
        self._held -= work.size
        if own.held == 0:
            del self._tenants[work.tenant]
        self._give_turns()


def whole(work: Pieces[T]) -> T:
    """What the work comes to, without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def _give_way() -> None:
    """Lower this thread's priority below the event loop's, on Linux, where each thread has its own niceness."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
