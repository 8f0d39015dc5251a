"""A model that people have: SmolLM2-135M-Instruct as a GGUF file, from the package index, in a real server."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import AsyncClient, assistant_message
from loraplex.v1.inference_pb2 import FINISH_REASON_TOOL_CALLS
from loraplex_demo.real.model import fetch
from loraplex_service.text import Tokenizer
from tests.e2e.conftest import END_SECONDS, START_SECONDS, Server, running_server

pytestmark = pytest.mark.slow

# The file's own template shows no tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou call functions: {{ tools | tojson }} Write <tool_call>[{...}]</tool_call>."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.tool_calls %}<tool_call>[{% for call in message.tool_calls %}{{ call.function | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]</tool_call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TEXTS = (
    "The capital of France is",
    "  several   spaces, 1234567 digits\n\n\tand tabs",
    "naïve cafés: 東京は日本の首都です 🦊",
    "def f(x):\n    return {'a': x**2}  # it's",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        return fetch(folder)
    except ConnectionError as error:
        pytest.skip(f"no package index is at hand: {error}")


@pytest.fixture(scope="module")
def served(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "tools.jinja").write_text(TEMPLATE)
    model = {"name": "smol", "model": str(file), "max_model_len": 1024, "kv_cache_bytes": 256 << 20}
    tools = {**model, "name": "smol-tools", "chat_template": str(folder / "tools.jinja")}
    with running_server(folder, models=[model, tools], adapters=[]) as server:
        yield server


@pytest.fixture
async def caller(served: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(served.data, timeout=END_SECONDS) as client:
        for name in ("smol", "smol-tools"):
            await client.wait_until_serving(f"models/{name}", timeout=START_SECONDS)
        yield client


def test_text_survives_its_tokens(file: Path) -> None:
    tokenizer = Tokenizer.load(file)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # As the tokenizer.json of the model has it.
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]


async def test_it_knows_the_capital_of_france(caller: AsyncClient) -> None:
    answer = await caller.generate("smol", "The capital of France is", max_tokens=4, temperature=0)
    assert answer.outputs[0].text.startswith(" Paris")
    assert answer.target.quantization == "gguf-Q4_1-Q8_0"


async def test_it_chats_by_the_template_and_ends_at_its_own_token(caller: AsyncClient) -> None:
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = await caller.generate("smol", asked, max_tokens=100, temperature=0)
    assert "Paris" in answer.outputs[0].text
    assert "<|im_end|>" not in answer.outputs[0].text
    assert answer.usage.completion_tokens < 100


async def test_a_loop_of_calls_and_results_ends_in_text(caller: AsyncClient) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris? Use get_weather."}]
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 100, "temperature": 0}
    called = (await caller.generate("smol-tools", messages, tool_choice="required", **options)).outputs[0]
    assert called.finished.reason == FINISH_REASON_TOOL_CALLS
    assert called.tool_calls[0].name == "get_weather"
    assert set(json.loads(called.tool_calls[0].arguments_json)) == {"city"}
    messages.append(assistant_message(called))
    messages += [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "Sun, 21 degrees."}
        for call in called.tool_calls
    ]
    answer = await caller.generate("smol-tools", messages, tool_choice="none", **options)
    assert answer.outputs[0].text
