"""`loraplex serve` with a token source in place of each engine. Started by `loraplex_grpc --steps-per-second`.

python -m benchmarks.systems.loraplex_frontend --config FILE --steps-per-second N
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from loraplex_service.app import running
from loraplex_service.assembly import LaunchFor
from loraplex_service.config import ServiceConfig, load_config


def token_sources(steps_per_second: float) -> LaunchFor:
    command = (sys.executable, "-m", "benchmarks.systems.token_source", "--steps-per-second", str(steps_per_second))

    async def launch(address: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(*command, "--bus", address)

    return lambda model: launch


async def serve(config: ServiceConfig, steps_per_second: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running(config, token_sources(steps_per_second)):
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps-per-second", type=float, required=True)
    args = parser.parse_args()
    uvloop.run(serve(load_config(args.config, {}), args.steps_per_second))


if __name__ == "__main__":
    main()
