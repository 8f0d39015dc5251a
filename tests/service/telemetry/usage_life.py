"""A service that keeps usage records, as a process of its own that can be killed.

python usage_life.py MODEL_DIRECTORY USAGE_FILE; its first line on stdout has the addresses of its data and admin ports.
"""

import asyncio
import sys

from loraplex_service.app import running
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.telemetry.config import UsageConfig
from tests.service.scripted_engine import ThreadedEngines

ROTATE_BYTES = 20_000  # so that the file is set aside several times in one life


async def live(model: str, file: str) -> None:
    config = ServiceConfig(
        models=(HostedModelConfig(name="tiny", model=model),),
        usage=UsageConfig(file=file, rotate_bytes=ROTATE_BYTES),
    ).with_free_ports()
    async with running(config, lambda _: ThreadedEngines().launch) as (app, addresses):
        await app.host.get("tiny").wait_settled()
        print(addresses.data, addresses.admin, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(live(*sys.argv[1:]))
