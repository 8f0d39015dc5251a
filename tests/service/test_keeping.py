"""Tasks that nobody waits for."""

import asyncio
import logging

import pytest

from loraplex_service.keeping import kept


async def test_what_failed_is_begun_again_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    begun: list[str] = []

    async def work() -> None:
        begun.append("now")
        if len(begun) < 3:
            raise KeyError("of a fault")

    await kept("look around", work, pause_seconds=0)
    assert len(begun) == 3
    faults = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert faults == ["a fault of this server: it failed to look around, and begins again"] * 2


async def test_who_is_cancelled_begins_nothing_again() -> None:
    task = asyncio.create_task(kept("wait", asyncio.Event().wait, pause_seconds=0))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
