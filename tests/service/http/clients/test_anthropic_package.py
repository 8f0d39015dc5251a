"""The real `anthropic` package as a client, in an environment of its own. Skipped where no package index is at hand."""

from pathlib import Path

import pytest

from tests.service.http.clients.environments import environment, needs_uvicorn, served, unheeded, until_idle, used

USE = r"""
import sys
import anthropic

client = anthropic.Anthropic(base_url=f"http://{sys.argv[1]}", api_key="any", max_retries=0)
assert [model.id for model in client.models.list()] == ["models/tiny", "tenants/shared/adapters/pirate"]
assert client.models.retrieve("pirate").display_name == "pirate"

said = [{"role": "user", "content": "hello"}]
answer = client.messages.create(model="pirate", messages=said, max_tokens=6, metadata={"user_id": "me"})
assert (answer.content[0].text, answer.stop_reason) == ("[user]", "max_tokens")
assert answer._request_id in answer.id
again = [*said, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "and?"}]
stopped = client.messages.create(model="tiny", messages=again, max_tokens=40, system="s", stop_sequences=["er"])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "er"), stopped
counted = client.messages.count_tokens(model="tiny", messages=said)
assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens

with client.messages.stream(model="tiny", messages=said, max_tokens=6) as stream:
    assert "".join(stream.text_stream) == "[user]"
    last = stream.get_final_message()
assert (last.usage.output_tokens, last.stop_reason) == (6, "max_tokens")

for kind, parameters in [
    (anthropic.BadRequestError, {"temperature": 11}),
    (anthropic.BadRequestError, {"container": "c"}),
    (anthropic.NotFoundError, {"model": "nobody"}),
]:
    try:
        client.messages.create(model="tiny", messages=said, max_tokens=6, extra_body=parameters)
    except kind as error:
        assert error.body["error"]["param"] == next(iter(parameters)), error.body
    else:
        raise AssertionError(parameters)

with client.messages.stream(model="tiny", messages=said, max_tokens=1_000_000) as stream:
    next(iter(stream.text_stream))
"""
KINDS = [
    ("/v1/messages", "anthropic.types.message_create_params:MessageCreateParamsStreaming"),
    ("/v1/messages/count_tokens", "anthropic.types.message_count_tokens_params:MessageCountTokensParams"),
]
NEEDLESS = {
    r"(.*\.)?cache_control(\.ttl)?": "what prompts begin with is cached without being asked",
    r".*\[tool_use\]\.caller|tools\[\]\.allowed_callers": "the model itself, as it is without",
    r"thinking\.display": "summarized, as it is without; test_messages has the other value",
    r"tools\[\]\.strict": "calls that are required follow schemas always",
    r"tools\[custom\]\.type": "as it is without",
    r"output_config\.format.*": "a form takes none of the prompt that is counted",
}


@pytest.fixture(scope="module")
def with_anthropic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("anthropic"), "anthropic>=0.60")


@pytest.mark.slow
@needs_uvicorn
async def test_the_anthropic_package_is_served(
    with_anthropic: Path, byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    async with served(byte_tokenizer_directory, tmp_path) as control:
        await used(with_anthropic, USE, str(control.addresses.http))
        await until_idle(control)


@pytest.mark.slow
async def test_each_field_of_the_anthropic_package_is_honoured_or_refused_by_name(with_anthropic: Path) -> None:
    assert await unheeded(with_anthropic, KINDS, NEEDLESS) == []
