"""A request ends while it waits for its next engine, at whatever moment."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loraplex_engine.link.client import EngineClient
from loraplex_service.errors import Cancelled
from loraplex_service.requests.succession import Succession
from tests.service.fake_engine import FakeEngine

CANCELLED = Cancelled("it was cancelled")


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    await engine.close()


async def test_one_that_ends_just_as_its_next_engine_is_there_does_not_go_on(engine: FakeEngine) -> None:
    async def successor() -> EngineClient:
        asyncio.get_running_loop().call_soon(succession.end, CANCELLED)
        return engine.client

    succession = Succession("id", engine.client, successor, None)
    with pytest.raises(Cancelled):
        await succession.next()


async def test_one_that_ended_before_waits_for_no_engine(engine: FakeEngine) -> None:
    async def never() -> EngineClient:
        raise AssertionError("it was asked for an engine")

    succession = Succession("id", engine.client, never, None)
    succession.end(CANCELLED)
    with pytest.raises(Cancelled):
        await succession.next()
