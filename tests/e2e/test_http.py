"""OpenAI's API in front of real engines."""

import json
from collections.abc import AsyncIterator

import pytest

from loraplex import AsyncClient
from tests.e2e.conftest import Server
from tests.service.http.caller import Caller, caller_of

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}


@pytest.fixture
async def caller(server: Server, client: AsyncClient) -> AsyncIterator[Caller]:
    async with caller_of(server.data, "storyteller") as caller:
        yield caller


async def test_a_completion_is_what_grpc_generates(caller: Caller, client: AsyncClient) -> None:
    own = await client.generate("pirate", "Once", max_tokens=8, temperature=0, logprobs=True)
    body = {"model": "pirate", "prompt": "Once", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    [choice] = (await caller.post("/v1/completions", body)).json["choices"]
    assert choice["text"] == own.outputs[0].text
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([each.logprob for each in own.outputs[0].logprobs])


async def test_an_echo_of_nothing_new_says_how_likely_a_text_is(caller: Caller, client: AsyncClient) -> None:
    """As evaluation tools ask for it."""
    own = await client.generate("storyteller", "Once upon", max_tokens=0, prompt_logprobs=1)
    [choice] = (await caller.complete("Once upon", max_tokens=0, echo=True, logprobs=1)).json["choices"]
    assert choice["text"] == "Once upon"
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx([token.logprob for token in own.prompt_logprobs[1:]])


async def test_outputs_have_the_form_that_response_format_asks_for(caller: Caller) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    answer = await caller.complete("A fox", response_format=form, n=4, temperature=1.5, seed=1, max_tokens=200)
    for choice in answer.json["choices"]:
        value = json.loads(choice["text"])
        assert value["animal"] in ("fox", "owl")
        assert 1 <= value["age"] <= 99
        assert choice["finish_reason"] == "stop"


async def test_embeddings_are_those_of_grpc(caller: Caller, client: AsyncClient) -> None:
    own = await client.embed("pirate", ["A fox"])
    [data] = (await caller.post("/v1/embeddings", {"model": "pirate", "input": "A fox"})).json["data"]
    assert data["embedding"] == pytest.approx(list(own.embeddings[0].values))
