"""Samples that were asked for and are fetched later. Their number, their bytes and their time are bounded."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4

from loraplex_service.http.failures import Refusal

MOST = 2048  # of all callers together; of one caller half of them, and half of the bytes
UNASKED_SECONDS = 60.0  # a client asks every 20 s, or when it has begun 256 of them


class Owner(NamedTuple):
    """Whose a sample is: whoever has the credentials and the tenant with which it was begun."""

    payer: bytes  # whose share of the room it takes, whatever tenant is named
    tenant: str


class Outcome(NamedTuple):
    """What is answered to whoever fetches a sample."""

    status: int
    kind: str  # its media type
    body: bytes


@dataclass(slots=True, eq=False)
class _Sample:
    owner: Owner
    size: int  # of the request; once there is an outcome, of that
    work: "asyncio.Task[None]"
    asked_at: float
    outcome: Outcome | None = None
    num_waiting: int = 0  # callers who wait for it
    is_fetched: bool = False


class Futures:
    """The samples that are under way or wait to be fetched. One that nobody asks for is cancelled and forgotten."""

    def __init__(self, most_bytes: int, most: int = MOST, unasked_seconds: float = UNASKED_SECONDS) -> None:
        self._most_bytes = most_bytes
        self._most = most
        self._unasked_seconds = unasked_seconds
        self._samples: dict[str, _Sample] = {}  # oldest first
        self._counts = Counter[bytes]()  # of them, by payer
        self._bytes = Counter[bytes]()
        self.num_bytes = 0  # of all requests that run and all outcomes that are kept

    def __len__(self) -> int:
        return len(self._samples)

    def begin(self, owner: Owner, size: int, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> str:
        """Begin a sample, and return its id. `size`: of its request. Raises Refusal where there is no room."""
        if not self._make_room(owner, size, 1):
            problem = "too many samples are under way, or have not been fetched; fetch them, and try again"
            raise Refusal(429, problem, code="rate_limit_exceeded", retry_after=1.0)
        loop, number = asyncio.get_running_loop(), uuid4().hex
        self._samples[number] = _Sample(owner, 0, loop.create_task(self._run(number, work)), loop.time())
        self._counts[owner.payer] += 1
        self._resize(self._samples[number], size)
        loop.call_later(self._unasked_seconds, self._look_at, number)
        return number

    async def fetch(self, number: str, owner: Owner, seconds: float) -> Outcome | None:
        """The outcome; None: there is none yet after so many seconds.

        Raises Refusal (410) for a sample that is not known, or not the caller's: it may be asked for again.
        """
        sample = self._find(number, owner)
        sample.num_waiting += 1
        try:
            await asyncio.wait({sample.work}, timeout=seconds)
        finally:
            sample.num_waiting -= 1
            sample.asked_at = asyncio.get_running_loop().time()
        if sample.work.done() and sample.outcome is None:
            raise _gone()
        sample.is_fetched = sample.outcome is not None
        return sample.outcome

    def cancel(self, number: str, owner: Owner) -> None:
        """Forget a sample, and stop its work. Raises as `fetch`."""
        self._find(number, owner)
        self._forget(number)

    async def close(self) -> None:
        """Stop all work."""
        running = [sample.work for sample in self._samples.values()]
        for number in list(self._samples):
            self._forget(number)
        await asyncio.gather(*running, return_exceptions=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _run(self, number: str, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> None:
        outcome = await work()
        sample = self._samples[number]
        if not self._make_room(sample.owner, len(outcome.body) - sample.size, 0):
            self._forget(number)  # its caller is told that it is gone
            return
        sample.outcome = outcome
        self._resize(sample, len(outcome.body))

    def _find(self, number: str, owner: Owner) -> _Sample:
        sample = self._samples.get(number)
        if sample is None or sample.owner != owner:
            raise _gone()
        return sample

    def _make_room(self, owner: Owner, size: int, count: int) -> bool:
        """Whether there is room for so much more, once what was fetched has been forgotten as far as it takes."""
        for number in [number for number, sample in self._samples.items() if sample.is_fetched]:
            if self._has_room(owner, size, count):
                break
            self._forget(number)
        return self._has_room(owner, size, count)

    def _has_room(self, owner: Owner, size: int, count: int) -> bool:
        return (
            len(self._samples) + count <= self._most
            and self.num_bytes + size <= self._most_bytes
            and self._counts[owner.payer] + count <= self._most // 2
            and self._bytes[owner.payer] + size <= self._most_bytes // 2
        )

    def _resize(self, sample: _Sample, size: int) -> None:
        self._bytes[sample.owner.payer] += size - sample.size
        self.num_bytes += size - sample.size
        sample.size = size

    def _look_at(self, number: str) -> None:
        """Forget a sample that nobody has asked for, for long; else look again when it might be time."""
        sample = self._samples.get(number)
        if sample is None:
            return
        loop = asyncio.get_running_loop()
        left = sample.asked_at + self._unasked_seconds - loop.time()
        if sample.num_waiting or left > 0:
            loop.call_later(max(left, self._unasked_seconds / 10), self._look_at, number)
        else:
            self._forget(number)

    def _forget(self, number: str) -> None:
        sample = self._samples.pop(number)
        sample.work.cancel()
        self._resize(sample, 0)
        self._counts[sample.owner.payer] -= 1
        if not self._counts[sample.owner.payer]:
            del self._counts[sample.owner.payer], self._bytes[sample.owner.payer]


def _gone() -> Refusal:
    problem = "there is no such sample: it was fetched or cancelled, or nobody asked for it for long; ask for it again"
    return Refusal(410, problem, code="sample_gone")
