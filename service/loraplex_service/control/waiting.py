"""Waiting for what a call has begun, for as long as its caller wants to."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from google.protobuf.duration_pb2 import Duration

from loraplex_service.timestamps import duration_seconds


class WaitRequest(Protocol):
    @property
    def wait(self) -> Duration: ...


def wait_seconds(request: WaitRequest) -> float:
    """The seconds that the caller wants to wait; 0 where the field is absent."""
    return duration_seconds(request.wait)


async def wait_until(
    condition: Callable[[], bool], subscribe: Callable[[Callable[[object], None]], Callable[[], None]], seconds: float
) -> None:
    """Wait until the condition holds or the time is over. The condition is checked after every reported change."""
    changed = asyncio.Event()
    unsubscribe = subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return
    finally:
        unsubscribe()
