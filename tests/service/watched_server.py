"""A whole service as a process of its own, to be watched: how long its event loop is held, and what memory it takes.

Prints the addresses of its two ports, then answers each line of its standard input with one of its own: for how long
its loop was held at most since the line before, by itself or by a thread that kept the interpreter, in milliseconds of
the process's CPU time.
"""

import asyncio
import sys
import time
from pathlib import Path

import uvloop

from loraplex_service.commands.servers import SWITCH_SECONDS, _limit_arenas
from loraplex_service.ports.config import DIALECTS
from tests.service.control_plane import control_plane
from tests.service.ports.guarded_server import HeldLoop


async def serve(tokenizer: Path, roots: Path) -> None:
    async with control_plane(tokenizer, roots, dialects=DIALECTS) as control:
        held = HeldLoop(time.process_time)
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        print(control.addresses.data, control.addresses.admin, flush=True)
        while await commands.readline():
            print(held.take() * 1000, flush=True)


if __name__ == "__main__":
    _limit_arenas()  # this and the next as `loraplex serve` does
    sys.setswitchinterval(SWITCH_SECONDS)
    uvloop.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
