"""Limits on one caller's use of shared resources: places for calls, memory for answers, time for refusals."""

import asyncio
from collections import Counter

from loraplex_service.errors import SlowConsumer, Unavailable

SMALL_ANSWER_BYTES = 16 << 10  # unread, they are bounded by the number of calls


class Places:
    """Counts the calls in progress by tenant, so that no tenant takes the places of others. For one event loop."""

    def __init__(self, most: int, retry_after_seconds: float = 1.0) -> None:
        """`most`: calls in progress of one tenant."""
        self._most = most
        self._retry_after_seconds = retry_after_seconds
        self._taken: Counter[str] = Counter()

    def enter(self, who: str) -> None:
        """Take a place. Raises Unavailable (OVERLOADED) if the tenant has none left."""
        if self._taken[who] >= self._most:
            raise Unavailable(
                "OVERLOADED",
                f"{self._most} calls are in progress for {who or 'calls whose credentials are being checked'}, and "
                "no more are accepted now; try again, or another replica",
                self._retry_after_seconds,
            )
        self._taken[who] += 1

    def leave(self, who: str) -> None:
        self._taken[who] -= 1
        if not self._taken[who]:
            del self._taken[who]


class Refusals:
    """Delays refusals: each waits for its turn and a pause, so that most of the loop's time is for other calls.

    A waiting call keeps a place of its connection, which can bring no other call instead. For one event loop.
    """

    def __init__(self, pause_seconds: float = 0.001, most_waiting: int = 256) -> None:
        """`most_waiting`: calls that may wait, at 22 KiB each. Further calls do not wait."""
        self._pause_seconds = pause_seconds
        self._most_waiting = most_waiting
        self._waiting = 0
        self._turn = asyncio.Lock()

    async def turn(self) -> None:
        """Wait for a turn; return at once if too many wait already."""
        if self._waiting >= self._most_waiting:
            return
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.sleep(self._pause_seconds)
        finally:
            self._waiting -= 1


class UnreadAnswers:
    """Counts the bytes of sent answers by tenant: gRPC keeps them in memory until they are read.

    gRPC cannot drop an answer once it has it. So a tenant that does not read its answers gets no more of them.
    """

    def __init__(self, most_bytes: int) -> None:
        """`most_bytes`: unread bytes of one tenant. A single answer may be larger."""
        self._most_bytes = most_bytes
        self._bytes: Counter[str] = Counter()

    def send(self, tenant: str, size: int) -> None:
        """Count an answer that is about to be sent. Raises SlowConsumer if too many bytes are unread."""
        unread = self._bytes[tenant]
        if unread and unread + size > self._most_bytes:
            raise SlowConsumer(f"{unread} bytes of earlier answers wait to be read; read them, or stream the answers")
        self._bytes[tenant] += size

    def sent(self, tenant: str, size: int) -> None:
        """Forget an answer: it has been read, or its caller is gone."""
        self._bytes[tenant] -= size
        if not self._bytes[tenant]:
            del self._bytes[tenant]
