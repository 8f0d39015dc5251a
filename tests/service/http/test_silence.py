"""Streams in which nothing comes for long have signs of life."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loraplex_service.errors import Unavailable
from loraplex_service.http import generations
from tests.service.data_plane import DataPlane
from tests.service.http.caller import Answer, Caller, caller_of
from tests.waits import MOST_SECONDS


@pytest.fixture
async def caller(plane: DataPlane, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Caller]:
    monkeypatch.setattr(generations, "PULSE_SECONDS", 0.01)
    plane.engine.steps_allowed = 0
    async with caller_of(plane.address, "demo") as caller:
        yield caller


async def after_silence(plane: DataPlane, caller: Caller, asked: "asyncio.Task[Answer]") -> Answer:
    async with asyncio.timeout(MOST_SECONDS):
        await caller.heard.wait()
        plane.engine.allow_steps(10**6)
        return await asked


async def test_anthropics_streams_have_pings(plane: DataPlane, caller: Caller) -> None:
    answer = await after_silence(plane, caller, asyncio.create_task(caller.message(stream=True)))
    kinds = [event["type"] for event in answer.events]
    assert (answer.status, kinds[0], kinds[-1]) == (200, "ping", "message_stop")
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cd"]], ids=["one", "several"])
async def test_other_streams_have_comments(plane: DataPlane, caller: Caller, prompt: str | list[str]) -> None:
    answer = await after_silence(plane, caller, asyncio.create_task(caller.complete(prompt, stream=True)))
    assert answer.body.startswith(b": waiting\n\n")
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_what_fails_after_a_sign_of_life_is_an_event(plane: DataPlane, caller: Caller) -> None:
    asked = asyncio.create_task(caller.message(stream=True))
    await caller.heard.wait()
    plane.entrance.end_all(Unavailable("DRAINING", "the server is shutting down"))
    answer = await asked
    assert (answer.status, answer.events[-1]["type"]) == (200, "error")
