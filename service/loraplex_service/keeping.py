"""Keeps tasks alive that run for as long as the process, and whose failure nobody would hear of."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0  # before what failed is begun again


async def kept(what: str, work: Callable[[], Awaitable[None]], pause_seconds: float = PAUSE_SECONDS) -> None:
    """Do some work, and begin it again for as long as it fails. `what`: says in the log what that was."""
    while True:
        try:
            return await work()
        except Exception:
            logger.exception("a fault of this server: it failed to %s, and begins again", what)
        await asyncio.sleep(pause_seconds)
