"""Chats and completions over HTTP, with a real service behind the door."""

import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_service.text import Tokenizer
from tests.service.control_plane import ControlPlane, write_adapter
from tests.service.data_plane import data_plane
from tests.service.http.caller import Caller, caller_of
from tests.waits import MOST_SECONDS


@pytest.fixture
async def other(byte_tokenizer: Tokenizer) -> AsyncIterator[Caller]:
    """In front of a data port whose engine knows log-probabilities."""
    async with data_plane(byte_tokenizer) as plane, caller_of(plane.address, "demo") as caller:
        yield caller


async def test_a_chat_is_answered_as_openai_does(caller: Caller) -> None:
    answer = await caller.chat("hi", n=2, user="me")
    assert answer.status == 200
    assert answer.headers["x-request-id"] in answer.json["id"]
    assert answer.json["object"] == "chat.completion"
    assert [choice["message"] for choice in answer.json["choices"]] == [{"role": "assistant", "content": "[use"}] * 2
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1]
    assert {choice["finish_reason"] for choice in answer.json["choices"]} == {"length"}
    assert answer.json["usage"]["completion_tokens"] == 8
    assert answer.json["usage"]["total_tokens"] == 8 + answer.json["usage"]["prompt_tokens"]


async def test_a_stream_adds_up_to_the_whole_and_ends_with_done(caller: Caller) -> None:
    *chunks, done = (await caller.chat("hi", stream=True)).events
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "[use"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [
        "length"
    ]
    assert not any("usage" in chunk for chunk in chunks)


async def test_a_stream_tells_its_usage_where_that_was_asked_for(caller: Caller) -> None:
    *chunks, last, _ = (await caller.chat("hi", stream=True, stream_options={"include_usage": True})).events
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("shown", [True, False])
async def test_each_chunk_tells_the_usage_of_its_choice_where_that_was_asked_for(caller: Caller, shown: bool) -> None:
    asked = {"include_usage": True, "continuous_usage_stats": True}
    answer = await caller.chat("hi", stream=True, n=2, stream_options=asked, return_token_ids=shown)
    *chunks, last, _ = answer.events
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        told = [chunk["usage"]["completion_tokens"] for chunk in own]
        assert told == sorted(told)
        assert (told[0], told[-1]) == (0, 4)
        assert {chunk["usage"]["prompt_tokens"] for chunk in own} == {last["usage"]["prompt_tokens"]}
    assert any("token_ids" in chunk["choices"][0] for chunk in chunks) is shown
    assert last["usage"]["completion_tokens"] == 8


async def test_of_several_prompts_each_chunk_tells_the_usage_of_its_choice(caller: Caller) -> None:
    asked = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = (await caller.complete(["a", "bcd"], stream=True, stream_options=asked)).events
    used = {chunk["choices"][0]["index"]: chunk["usage"] for chunk in chunks}
    assert [(used[index]["prompt_tokens"], used[index]["completion_tokens"]) for index in (0, 1)] == [(1, 4), (3, 4)]
    assert last["usage"]["total_tokens"] == 12
    assert not any("token_ids" in chunk["choices"][0] for chunk in chunks)


async def test_a_stop_string_ends_a_chat_and_is_told(caller: Caller) -> None:
    [choice] = (await caller.chat("hi", stop=["er"], max_tokens=40)).json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("[us", "stop", "er")


async def test_chats_have_log_probabilities(other: Caller) -> None:
    [choice] = (await other.chat("hi", logprobs=True, top_logprobs=2, max_tokens=2)).json["choices"]
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == ("[", [91])
    assert first["logprob"] <= 0
    assert len(second["top_logprobs"]) == 2


async def test_completions_have_log_probabilities_in_their_older_form(other: Caller) -> None:
    [choice] = (await other.complete("ab", logprobs=1, max_tokens=3)).json["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list(choice["text"])
    assert logprobs["text_offset"] == [0, 1, 2]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 3


async def test_an_echo_brings_the_prompts_log_probabilities(other: Caller) -> None:
    [choice] = (await other.complete("ab", echo=True, logprobs=1, max_tokens=1)).json["choices"]
    assert choice["text"].startswith("ab")
    tokens = choice["logprobs"]["tokens"]
    assert tokens[-3:-1] == ["a", "b"]
    assert choice["logprobs"]["token_logprobs"][0] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_have_choices_of_their_own(caller: Caller, stream: bool) -> None:
    answer = await caller.complete(["ab", [99, 100]], n=2, stream=stream)
    answers = answer.events[:-1] if stream else [answer.json]
    choices = sorted((choice for part in answers for choice in part["choices"]), key=lambda choice: choice["index"])
    assert [(choice["index"], choice["text"]) for choice in choices] == list(
        enumerate(["abab", "abab", "cdcd", "cdcd"])
    )


async def test_one_prompt_that_fails_fails_its_request(caller: Caller) -> None:
    error = (await caller.complete(["ab", [99, 100_000]])).error
    assert error["param"].startswith("prompt")
    assert error["code"] == "invalid_value"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_of_tokens_is_their_text(caller: Caller, stream: bool) -> None:
    answer = await caller.complete([97, 98], echo=True, stream=stream)
    parts = answer.events[:-1] if stream else [answer.json]
    assert "".join(part["choices"][0]["text"] for part in parts) == "ababab"


async def test_adapters_and_routes_are_models(control: ControlPlane, caller: Caller) -> None:
    write_adapter(control.roots / "pirate")
    source = str(control.roots / "pirate")
    created = await control.admin.create_adapter("pirate", base_model="tiny", source=source, wait=MOST_SECONDS)
    route = Route(name="tenants/shared/routes/main", targets=[RouteTarget(model="tiny", weight=1)])
    await control.admin.update_route(route, allow_missing=True)
    listed = (await caller.get("/v1/models")).json
    names = ["models/tiny", "tenants/shared/adapters/pirate", "tenants/shared/routes/main"]
    assert [model["id"] for model in listed["data"]] == names
    assert listed["data"][1]["parent"] == "models/tiny"
    for name in (*names, "pirate"):
        answer = await caller.chat(model=name)
        assert answer.status == 200, answer.body
        assert answer.json["model"] == name
    adapted = await caller.chat(model="pirate")
    assert adapted.headers["loraplex-adapter-version"] == created.version
    assert adapted.headers["loraplex-adapter"] == created.name
    found = (await caller.get("/v1/models/pirate")).json
    assert (found["id"], found["parent"]) == ("pirate", "models/tiny")
    for told in listed["data"]:
        found = (await caller.get(f"/v1/models/{told['id']}")).json
        assert found["created"] == told["created"] > 0
        assert found["max_model_len"] == listed["data"][0]["max_model_len"] > 0


async def test_embeddings_come_as_numbers_or_as_their_bytes(caller: Caller) -> None:
    request = {"model": "tiny", "input": ["a", [98, 99]]}
    plain = (await caller.post("/v1/embeddings", request)).json
    packed = (await caller.post("/v1/embeddings", request | {"encoding_format": "base64"})).json
    assert plain["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    for one, other in zip(plain["data"], packed["data"], strict=True):
        values = base64.b64decode(other["embedding"])
        assert list(struct.unpack(f"<{len(values) // 4}f", values)) == pytest.approx(one["embedding"])


async def test_texts_become_tokens_and_tokens_texts(caller: Caller) -> None:
    tokens = (await caller.post("/tokenize", {"model": "tiny", "prompt": "hé"})).json
    assert tokens == {"count": 3, "max_model_len": 1 << 20, "tokens": [104, 195, 169]}
    text = await caller.post("/detokenize", {"model": "tiny", "tokens": tokens["tokens"]})
    assert text.json == {"prompt": "hé"}


async def test_a_conversation_becomes_the_tokens_that_a_chat_would_read(caller: Caller) -> None:
    said = [{"role": "user", "content": "x"}]
    tokens = (await caller.post("/tokenize", {"model": "tiny", "messages": said})).json["tokens"]
    assert bytes(tokens) == b"[user]x[assistant]"


@pytest.mark.parametrize(("path", "said"), [("/health", {"status": "ok"}), ("/version", {"version": "1.2.3"})])
async def test_what_the_server_says_of_itself(caller: Caller, path: str, said: Any) -> None:
    answer = await caller.get(path)
    assert (answer.status, answer.json) == (200, said)
