"""OpenAI's Responses, with a real service behind the door."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loraplex_service.errors import Unavailable
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane
from tests.service.http.caller import Caller, caller_of


@pytest.fixture
async def other(byte_tokenizer: Tokenizer) -> AsyncIterator[tuple[DataPlane, Caller]]:
    """In front of a data port whose engine knows log-probabilities."""
    async with data_plane(byte_tokenizer) as plane, caller_of(plane.address, "demo") as caller:
        yield plane, caller


async def test_a_response_is_told_as_openai_does(caller: Caller) -> None:
    asked = {"instructions": "s", "metadata": {"a": "b"}, "temperature": 0.5}
    answer = await caller.respond("hi", **asked)
    told = answer.json
    assert (answer.status, told["object"]) == (200, "response")
    assert told["id"] == f"resp_{answer.headers['x-request-id']}"
    [item] = told["output"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", "[sys")
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert {name: told[name] for name in asked} == asked
    assert (told["store"], told["previous_response_id"]) == (False, None)
    assert told["usage"]["total_tokens"] == told["usage"]["input_tokens"] + 4


async def test_a_stream_ends_with_the_whole(caller: Caller) -> None:
    events = (await caller.respond("hi", stream=True)).events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    last = events[-1]
    assert (last["type"], "".join(deltas)) == ("response.incomplete", "[use")
    assert last["response"]["output"][0]["content"][0]["text"] == "[use"
    assert last["response"]["usage"]["output_tokens"] == 4
    assert {event["response"]["id"] for event in events if "response" in event} == {last["response"]["id"]}


async def test_log_probabilities_are_told_where_they_are_asked_for(other: tuple[DataPlane, Caller]) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    [item] = (await other[1].respond("hi", **asked)).json["output"]
    first, *others = item["content"][0]["logprobs"]
    assert (first["token"], len(others)) == ("[", 3)
    assert len(first["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"temperature": 11}, 400, "temperature"),
        ({"model": "nobody"}, 404, "model"),
        ({"input": []}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"input": [{"role": "", "content": "x"}]}, 400, "input[0].role"),
        ({"store": True}, 400, "store"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ],
)
async def test_the_parameter_at_fault_is_named(caller: Caller, given: dict[str, Any], status: int, param: str) -> None:
    answer = await caller.respond(**given)
    assert (answer.status, answer.error["param"]) == (status, param)


async def test_what_fails_in_a_stream_is_a_response_that_failed(other: tuple[DataPlane, Caller]) -> None:
    plane, caller = other
    plane.engine.steps_allowed = 1
    asked = asyncio.create_task(caller.respond(stream=True, max_output_tokens=50))
    await caller.heard.wait()
    plane.entrance.end_all(Unavailable("DRAINING", "the server is shutting down"))
    last = (await asked).events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert (last["response"]["error"]["code"], last["response"]["error"]["reason"]) == ("server_error", "DRAINING")
