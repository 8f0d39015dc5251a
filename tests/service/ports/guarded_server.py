"""A server that asks for credentials, as a process of its own, so that what is done to it can be measured.

It answers each line of its standard input with one of its own: for how long its event loop was held at most since the
line before, in milliseconds of CPU time, so that what else runs on the machine does not count.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.door import Door
from loraplex_service.text import Tokenizer
from tests.service.data_plane import data_plane

TICK_SECONDS = 0.001


class HeldLoop:
    """Watches how long the loop goes without coming back to its timers."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        """`clock`: of what the loop itself does, or of the whole process, whose threads may keep the interpreter."""
        self._longest = 0.0
        self._clock = clock
        self._last = clock()
        self._tick()

    def take(self) -> float:
        longest, self._longest = self._longest, 0.0
        return longest

    def _tick(self) -> None:
        now = self._clock()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)


async def serve(tokenizer: Path, keys: str) -> None:
    door = Door(AuthConfig(keys=keys))
    async with data_plane(Tokenizer.load(tokenizer), door=door) as plane:
        gc.collect()
        gc.freeze()  # as `loraplex serve` does
        held = HeldLoop()
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        print(plane.address, flush=True)
        while await commands.readline():
            plane.engine.forget()
            print(held.take() * 1000, flush=True)
        plane.errors.records.clear()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), sys.argv[2]))
