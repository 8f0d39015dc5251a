"""The real `openai` package as a client, in an environment of its own. Skipped where no package index is at hand."""

from pathlib import Path

import pytest

from tests.service.http.clients.environments import environment, needs_uvicorn, served, unheeded, until_idle, used

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

KINDS = [
    ("/v1/chat/completions", "openai.types.chat.completion_create_params:CompletionCreateParamsStreaming"),
    ("/v1/responses", "openai.types.responses.response_create_params:ResponseCreateParamsStreaming"),
    ("/v1/completions", "openai.types.completion_create_params:CompletionCreateParamsStreaming"),
    ("/v1/embeddings", "openai.types.embedding_create_params:EmbeddingCreateParams"),
]
NEEDLESS = {
    r".*\[text\]\.prompt_cache_breakpoint.*": "what prompts begin with is cached without being asked",
    r"stream_options\.include_obfuscation": "what it hides from who listens, TLS is for",
    r"tools\[function\]\.function\.strict|text\.format\.strict": "required calls and forms follow schemas always",
    r"text\.format\.description": "the model is not told of the form: it cannot but keep to it",
    r"input\[\w+\]\.(id|status|phase|type)": "of items that come back as they came: nothing for a prompt",
    r"input\[message\]\.content\[output_text\]\.logprobs": "the same",
    r"input\[reasoning\]\.(encrypted_content|status)": "who wrote it alone can read it",
    r"reasoning\.(context|summary|generate_summary)": "as it is without",
    r"tools\[function\]\.allowed_callers": "the model itself, as it is without",
}


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
async def test_each_field_of_the_openai_package_is_honoured_or_refused_by_name(with_openai: Path) -> None:
    assert await unheeded(with_openai, KINDS, NEEDLESS) == []
