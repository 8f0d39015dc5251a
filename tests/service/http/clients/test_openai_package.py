"""The real `openai` package as a client, in an environment of its own. Skipped where no package index is at hand."""

from pathlib import Path

import pytest

from tests.service.http.clients.environments import environment, needs_uvicorn, served, until_idle, untold, used

USE = r"""
import sys
import openai

client = openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="any", max_retries=0)
names = [model.id for model in client.models.list()]
assert names == ["models/tiny", "tenants/shared/adapters/pirate"], names
assert client.models.retrieve("pirate").id == "pirate"

said = [{"role": "user", "content": "hello"}]
answer = client.chat.completions.create(model="pirate", messages=said, max_completion_tokens=6, n=2, seed=1, user="me")
assert [choice.message.content for choice in answer.choices] == ["[user]"] * 2
assert answer._request_id in answer.id
again = [*said, answer.choices[0].message, {"role": "user", "content": "and?"}]
assert client.chat.completions.create(model="tiny", messages=again, max_tokens=1).choices[0].finish_reason == "length"

streaming = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(client.chat.completions.create(model="tiny", messages=said, max_tokens=6, **streaming))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "[user]"
assert chunks[-1].usage.completion_tokens == 6

several = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=4)
assert [choice.text for choice in several.choices] == ["abab", "cdcd"]
assert len(client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2

asked = {"input": "hello", "max_output_tokens": 6}
made = client.responses.create(model="pirate", instructions="s", metadata={"a": "b"}, **asked)
assert (made.output_text, made.status, made.incomplete_details.reason) == ("[syste", "incomplete", "max_output_tokens")
assert (made.metadata, made.store, made.usage.output_tokens) == ({"a": "b"}, False, 6), made
again = [{"role": "user", "content": "hello"}, *made.output, {"role": "user", "content": "and?"}]
assert client.responses.create(model="tiny", input=again, max_output_tokens=6).output_text == "[user]"
with client.responses.stream(model="tiny", **asked) as stream:
    deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
assert "".join(deltas) == "[user]"
try:
    client.responses.create(model="tiny", input="hello", previous_response_id=made.id)
except openai.BadRequestError as error:
    assert error.param == "previous_response_id"
else:
    raise AssertionError("nothing is kept")

for kind, parameters in [
    (openai.BadRequestError, {"temperature": 11}),
    (openai.BadRequestError, {"store": True}),
    (openai.NotFoundError, {"model": "nobody"}),
]:
    try:
        client.chat.completions.create(**{"model": "tiny", "messages": said, **parameters})
    except kind as error:
        assert error.param == next(iter(parameters)), error.param
    else:
        raise AssertionError(parameters)

with client.chat.completions.create(model="tiny", messages=said, max_tokens=1_000_000, stream=True) as stream:
    next(iter(stream))
"""


PARAMETERS = r"""
import json
from typing import get_type_hints
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

kinds = {
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsStreaming,
    "/v1/responses": response_create_params.ResponseCreateParamsStreaming,
    "/v1/completions": completion_create_params.CompletionCreateParamsStreaming,
    "/v1/embeddings": embedding_create_params.EmbeddingCreateParams,
}
print(json.dumps({path: list(get_type_hints(kind)) for path, kind in kinds.items()}))
"""


@pytest.fixture(scope="module")
def with_openai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("openai"), "openai>=2")


@pytest.mark.slow
@needs_uvicorn
async def test_the_openai_package_is_served(with_openai: Path, byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    async with served(byte_tokenizer_directory, tmp_path) as control:
        await used(with_openai, USE, str(control.addresses.http))
        await until_idle(control)


@pytest.mark.slow
async def test_each_parameter_of_the_openai_package_is_honoured_or_refused_by_name(with_openai: Path) -> None:
    assert untold(await used(with_openai, PARAMETERS)) == {}
