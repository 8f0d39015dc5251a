"""Callers that leave: the call of the service ends with them, and nothing is left behind."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.service.data_plane import DataPlane
from tests.service.http.caller import Caller, caller_of


@pytest.fixture
async def caller(plane: DataPlane) -> AsyncIterator[Caller]:
    plane.endless()
    async with caller_of(plane.address, "demo") as caller:
        yield caller


@pytest.mark.parametrize("stream", [True, False])
async def test_the_engine_forgets_a_caller_that_left(plane: DataPlane, caller: Caller, stream: bool) -> None:
    asked = asyncio.create_task(caller.complete(stream=stream, max_tokens=1 << 20))
    await plane.engine.until(lambda: bool(plane.engine.sequences))
    caller.leave.set()
    await asked
    await plane.engine.until_idle()
    assert plane.engine.used_blocks == 0
    assert caller.clients.num_calls == 0


async def test_several_prompts_are_forgotten_together(plane: DataPlane, caller: Caller) -> None:
    asked = asyncio.create_task(caller.complete(["ab", "cd"], max_tokens=1 << 20))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
    caller.leave.set()
    await asked
    await plane.engine.until_idle()


async def leave_often(plane: DataPlane, caller: Caller, times: int, at_once: int = 10) -> None:
    """Callers that leave in the middle of their streams, some at a time: no more than the model has places for."""

    async def one() -> None:
        another = Caller(caller.door, caller.clients, "demo")
        asked = asyncio.create_task(another.complete(stream=True, max_tokens=1 << 20))
        await another.heard.wait()
        another.leave.set()
        assert (await asked).status == 200

    for _ in range(times // at_once):
        await asyncio.gather(*(one() for _ in range(at_once)))
        await plane.engine.until_idle()
        await plane.admission.wait_idle()


async def assert_nothing_is_left(plane: DataPlane, caller: Caller) -> None:
    assert plane.engine.used_blocks == 0
    assert caller.clients.num_calls == 0
    assert caller.door._room.taken == 0
    assert len(asyncio.all_tasks()) < 20


async def test_many_that_leave_in_mid_stream_leave_nothing_behind(plane: DataPlane, caller: Caller) -> None:
    await leave_often(plane, caller, 50)
    await assert_nothing_is_left(plane, caller)


@pytest.mark.slow
async def test_a_thousand_that_leave_in_mid_stream_leave_nothing_behind(plane: DataPlane, caller: Caller) -> None:
    await leave_often(plane, caller, 1000)
    await assert_nothing_is_left(plane, caller)


async def test_more_calls_than_a_connection_takes_go_over_another(plane: DataPlane) -> None:
    async with caller_of(plane.address, "demo") as caller:
        caller.clients._calls_per_client = 2
        answers = await asyncio.gather(*(caller.complete() for _ in range(5)))
        assert {answer.status for answer in answers} == {200}
        assert len(caller.clients._calls) == 3
