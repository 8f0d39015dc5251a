"""Anthropic's API, with a real service behind the door."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.door import Door
from loraplex_service.errors import Unavailable
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane
from tests.service.http.caller import Caller, caller_of

CONVERSATION: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def other(plane: DataPlane) -> AsyncIterator[Caller]:
    async with caller_of(plane.address, "demo") as caller:
        yield caller


async def test_a_message_is_answered_as_anthropic_does(caller: Caller) -> None:
    answer = await caller.message("hi")
    assert answer.status == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert answer.json["id"] == f"msg_{answer.headers['request-id']}"
    assert (answer.json["type"], answer.json["role"], answer.json["model"]) == ("message", "assistant", "tiny")
    assert answer.json["content"] == [{"type": "text", "text": "[use"}]
    assert (answer.json["stop_reason"], answer.json["stop_sequence"]) == ("max_tokens", None)
    assert answer.json["usage"]["output_tokens"] == 4


async def test_tokens_from_the_cache_are_no_input_tokens(caller: Caller) -> None:
    usage = (await caller.message("hi")).json["usage"]
    counted = (await caller.post("/v1/messages/count_tokens", CONVERSATION)).json
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]


async def test_a_stop_sequence_ends_a_message_and_is_told(caller: Caller) -> None:
    message = (await caller.message("hi", stop_sequences=["er"], max_tokens=40)).json
    assert message["content"] == [{"type": "text", "text": "[us"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "er")


async def test_a_stream_adds_up_to_the_whole(caller: Caller) -> None:
    events = (await caller.message("hi", stream=True)).events
    start, *others = events
    assert start["message"]["content"] == []
    assert start["message"]["usage"]["input_tokens"] > 0
    kinds = [event["type"] for event in others]
    assert kinds[0] == "content_block_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"] for event in others if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == "[use"
    assert others[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert others[-2]["usage"]["output_tokens"] == 4


async def test_an_assistants_turn_at_the_end_is_gone_on_with(caller: Caller) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yz"}]
    open_end = (await caller.post("/v1/messages/count_tokens", CONVERSATION | {"messages": turns})).json["input_tokens"]
    assert open_end == len("[user]x[assistant]yz")


@pytest.mark.parametrize(
    ("given", "status", "kind"),
    [
        ({"temperature": 11}, 400, "invalid_request_error"),
        ({"model": "nobody"}, 404, "not_found_error"),
        ({"container": "c"}, 400, "invalid_request_error"),
        ({"max_tokens": -1}, 400, "invalid_request_error"),
    ],
)
async def test_what_is_wrong_is_told_in_anthropics_words(
    caller: Caller, given: dict[str, Any], status: int, kind: str
) -> None:
    answer = await caller.message(**given)
    assert (answer.status, answer.json["type"]) == (status, "error")
    assert (answer.error["type"], answer.error["param"]) == (kind, next(iter(given)))
    assert answer.error["message"]


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/count_tokens/x", "/v1/models/nobody"])
async def test_each_path_of_anthropics_tells_errors_in_its_words(caller: Caller, path: str) -> None:
    answer = await caller.get(path, {"anthropic-version": "2023-06-01"})
    assert (answer.status, answer.json["type"], answer.error["type"]) == (404, "error", "not_found_error")


async def test_an_error_has_the_id_of_its_request(caller: Caller) -> None:
    answer = await caller.message(model="nobody")
    assert answer.json["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert answer.json["request_id"] != (await caller.message(container="c")).json["request_id"]


async def test_a_wrong_method_is_told_in_anthropics_words(caller: Caller) -> None:
    answer = await caller.get("/v1/messages")
    assert (answer.status, answer.json["type"], answer.headers["allow"]) == (405, "error", "POST")


async def test_a_fault_behind_tool_results_has_the_place_of_its_turn(caller: Caller) -> None:
    calls = [{"type": "tool_use", "id": id, "name": "now", "input": {}} for id in ("a", "b" * 300)]
    result = {"type": "tool_result", "tool_use_id": "a", "content": "1"}
    turns = [("assistant", calls[:1]), ("user", [result]), ("assistant", calls[1:])]
    said = [{"role": role, "content": content} for role, content in turns]
    answer = await caller.post("/v1/messages", CONVERSATION | {"messages": said})
    assert answer.error["param"] == "messages[2].content[0].id"


async def test_what_fails_in_a_stream_is_its_last_event(plane: DataPlane, other: Caller) -> None:
    plane.engine.steps_allowed = 1
    asked = asyncio.create_task(other.message(stream=True, max_tokens=50))
    await other.heard.wait()
    plane.entrance.end_all(Unavailable("DRAINING", "the server is shutting down"))
    last = (await asked).events[-1]
    assert (last["type"], last["error"]["type"], last["error"]["reason"]) == ("error", "overloaded_error", "DRAINING")
    assert last["request_id"]


async def test_a_key_is_a_token(byte_tokenizer: Tokenizer) -> None:
    door = Door(AuthConfig(trusted_peers=("10.0.0.0/8",)))
    async with data_plane(byte_tokenizer, door=door) as plane, caller_of(plane.address, "demo") as caller:
        answer = await caller.post("/v1/messages", CONVERSATION, {"x-api-key": "no"})
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")


async def test_two_credentials_are_refused(caller: Caller) -> None:
    answer = await caller.post("/v1/messages", CONVERSATION, {"x-api-key": "a", "authorization": "Bearer b"})
    assert (answer.status, answer.error["param"]) == (401, "x-api-key")
