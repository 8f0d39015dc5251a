"""Tools and reasoning, from the client to a real engine and back."""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from loraplex import AsyncClient, assistant_message
from loraplex.v1.inference_pb2 import FINISH_REASON_TOOL_CALLS, GenerateOutput
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_REASONING, MODEL_CAPABILITY_TOOLS
from tests.e2e.conftest import DEMO, END_SECONDS, START_SECONDS, Server, running_server
from tests.service.http.caller import caller_of

# The storyteller, which was never taught any of this, in the dress of other models.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "legs": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["animal", "legs"],
}
TOOLS = [
    {"name": "count_legs", "description": "Counts.", "parameters": SCHEMA},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
]
SHARED = Path(__file__).parents[3] / "shared/data"
QWEN, CONFIGS = SHARED / "tokenizers/qwen2_bpe_slow", SHARED / "tokenizer-configs"
ASKED = [{"role": "user", "content": "How many legs has a fox?"}]


@pytest.fixture(scope="module")
def dressed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("dressed")
    shutil.copytree(DEMO / "models" / "storyteller", directory / "model")
    (directory / "model" / "chat_template.jinja").write_text(TEMPLATE)
    model = {"name": "dressed", "model": str(directory / "model"), "threads": 1, "kv_cache_bytes": 64 << 20}
    with running_server(directory, models=[model], adapters=[]) as server:
        yield server


@pytest.fixture
async def caller(dressed: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(dressed.data, timeout=END_SECONDS) as client:
        await client.wait_until_serving("models/dressed", timeout=START_SECONDS)
        yield client


def arguments(output: GenerateOutput) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments_json)) for call in output.tool_calls]


async def test_a_model_says_that_it_calls_tools_and_reasons(caller: AsyncClient) -> None:
    capabilities = (await caller.get_model("dressed")).capabilities
    assert {MODEL_CAPABILITY_TOOLS, MODEL_CAPABILITY_REASONING} <= set(capabilities)


async def test_required_calls_are_valid_whatever_is_drawn(caller: AsyncClient) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    answer = await caller.generate("dressed", ASKED, **options, n=16, max_tokens=400, temperature=1.5, seed=3)
    for output in answer.outputs:
        assert output.finished.reason == FINISH_REASON_TOOL_CALLS
        assert output.text == ""
        for name, given in arguments(output):
            assert name in ("count_legs", "now")
            assert name == "now" or (given["animal"] in ("fox", "owl") and 1 <= given["legs"] <= 9)
    assert {name for output in answer.outputs for name, _ in arguments(output)} == {"count_legs", "now"}


async def test_a_named_tool_is_called_once_in_a_stream(caller: AsyncClient) -> None:
    stream = caller.stream_generate("dressed", ASKED, tools=TOOLS, tool_choice="count_legs", max_tokens=200, seed=1)
    [output] = (await stream.collect()).outputs
    [(name, given)] = arguments(output)
    assert (name, set(given)) == ("count_legs", {"animal", "legs"})
    assert output.finished.reason == FINISH_REASON_TOOL_CALLS


async def test_a_loop_of_calls_and_results_ends(caller: AsyncClient) -> None:
    messages: list[Any] = list(ASKED)
    for choice, limit in (("required", 400), ("auto", 40)):
        answer = await caller.generate(
            "dressed", messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=limit, seed=2
        )
        messages.append(assistant_message(answer.outputs[0]))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "4"}
            for call in answer.outputs[0].tool_calls
        ]
    assert [message.role if hasattr(message, "role") else message["role"] for message in messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


async def test_outputs_with_tools_and_without_share_an_engine(caller: AsyncClient) -> None:
    plain = await caller.generate("dressed", "A fox", max_tokens=20, temperature=0)
    stream = caller.stream_generate(
        "dressed", ASKED, tools=TOOLS, tool_choice="required", max_tokens=200, seed=4, temperature=0.7
    )
    again = await caller.generate("dressed", "A fox", max_tokens=20, temperature=0)
    assert (await stream.collect()).outputs[0].tool_calls
    assert again.outputs[0].text == plain.outputs[0].text


@pytest.mark.skipif(not QWEN.is_dir(), reason="no tokenizers of other projects here")
async def test_required_calls_are_valid_with_a_large_vocabulary(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    config = Qwen2Config(
        vocab_size=151_680,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    for file in QWEN.iterdir():
        shutil.copy(file, directory)
    chat_template = json.loads(next(CONFIGS.glob("*qwen3_30b-*")).read_text())["chat_template"]
    (directory / "chat_template.jinja").write_text(chat_template)
    model = {"name": "random", "model": str(directory), "threads": 1, "kv_cache_bytes": 64 << 20}
    with running_server(tmp_path, models=[model], adapters=[]) as server:
        async with AsyncClient(server.data, timeout=END_SECONDS) as client:
            await client.wait_until_serving("models/random", timeout=START_SECONDS)
            answer = await client.generate(
                "random",
                ASKED,
                tools=TOOLS,
                tool_choice="required",
                parallel_tool_calls=False,
                template_kwargs={"enable_thinking": False},
                max_tokens=400,
                n=8,
                seed=5,
            )
    for output in answer.outputs:
        [(name, _)] = arguments(output)
        assert name in ("count_legs", "now")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_tool_is_called_over_http_too(dressed: Server, caller: AsyncClient, stream: bool) -> None:
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    choice = {"type": "function", "function": {"name": "count_legs"}}
    asked = {"tools": tools, "tool_choice": choice, "max_tokens": 200, "seed": 1, "stream": stream}
    async with caller_of(dressed.data, "dressed") as http:
        answer = await http.chat("How many legs has a fox?", **asked)
    said = [part["choices"][0] for part in (answer.events[:-1] if stream else [answer.json])]
    [call] = [call for part in said for call in part["delta" if stream else "message"].get("tool_calls", ())]
    assert call["function"]["name"] == "count_legs"
    assert set(json.loads(call["function"]["arguments"])) == {"animal", "legs"}
    assert said[-1]["finish_reason"] == "tool_calls"
