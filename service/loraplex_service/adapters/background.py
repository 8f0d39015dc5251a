"""Work on adapters that goes on after the call that began it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from loraplex_service.errors import LoraplexError

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # that cancelled work has to clear up


class BackgroundWork:
    """Runs tasks that nobody needs to wait for, and logs those that fail."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is under way."""
        return not self._tasks

    def begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Begin some work. A caller that waits for the task gets its error as well."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        if self._is_closed:  # what it needs may be gone
            task.cancel()
        return task

    async def close(self) -> None:
        """Cancel all work, and what is begun from now on. Waits a while for it to clear up."""
        self._is_closed = True
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, LoraplexError):
                logger.warning("a change of the adapters could not be completed: %s", error)
                return
            logger.error("a change of the adapters could not be completed", exc_info=error)
