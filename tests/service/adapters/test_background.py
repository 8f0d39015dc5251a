"""Work on adapters that is under way when the server ends."""

import asyncio
import logging
from pathlib import Path

import pytest

from loraplex_service.adapters.background import BackgroundWork
from tests.service.control_plane import control_plane


async def test_work_that_a_shutdown_ends_clears_up_in_peace(
    byte_tokenizer_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places: list[Path] = []
    caplog.set_level(logging.WARNING)
    async with control_plane(byte_tokenizer_directory, tmp_path, state_directory=str(tmp_path / "state")) as control:
        library, gathered = control.app.library, asyncio.Event()

        async def gather() -> None:
            async with library.gather() as gathering:
                places.append(gathering.directory)
                gathered.set()
                await asyncio.Event().wait()

        control.app.work.begin(gather())
        await gathered.wait()
    assert [record.getMessage() for record in caplog.records] == []
    assert not places[0].exists()


async def test_work_that_begins_after_the_end_is_cancelled() -> None:
    work = BackgroundWork()
    await work.close()
    task = work.begin(asyncio.sleep(3600))
    with pytest.raises(asyncio.CancelledError):
        await task
