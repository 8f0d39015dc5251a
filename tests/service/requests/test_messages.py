"""Outputs that are messages: calls of tools and reasoning come apart from the text, from the request to the answer."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import (
    FINISH_REASON_EOS,
    FINISH_REASON_MAX_TOKENS,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    BatchGenerateRequest,
    GenerateOutput,
    StreamGenerateRequest,
    StreamGenerateResponse,
)
from loraplex.v1.prompt_pb2 import TOOL_MODE_NONE, TOOL_MODE_REQUIRED, Chat, ChatMessage, Prompt, Tool, ToolCall
from loraplex_engine.link.grammar import behind_thought, regex_grammar, thought_rules
from loraplex_service.text import Tokenizer
from tests.service.data_plane import EOS, DataPlane, data_plane, failure, next_of

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call></tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = Tool(name="weather", description="Looks.", parameters_json='{"properties": {"days": {"type": "integer"}}}')
CALL = '<tool_call>\n{"name": "weather", "arguments": {"days": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'


def with_template(base: Path, directory: Path, template: str, **config: Any) -> Tokenizer:
    (directory / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    told = json.loads((base / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": template, **config}))
    return Tokenizer.load(directory)


@pytest.fixture
async def tools(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[DataPlane]:
    """A model whose chat template shows tools, reasons, and whose context is long."""
    async with data_plane(with_template(byte_tokenizer_directory, tmp_path, TEMPLATE)) as plane:
        plane.endless()
        yield plane


def chat(**fields: Any) -> Prompt:
    return Prompt(chat=Chat(**{"messages": [ChatMessage(role="user", content="Hi")], "tools": [WEATHER], **fields}))


def spec(prompt: Prompt | None = None, **fields: Any) -> GenerateSpec:
    values: dict[str, Any] = {"model": "demo", "prompt": prompt or chat(), "stopping": {"max_tokens": 1000}}
    return GenerateSpec(**{**values, **fields})


def says(plane: DataPlane, *texts: str) -> None:
    """What the model writes next, in turn, with its end."""
    plane.engine.scripts += [[*text.encode(), EOS] for text in texts]


async def answer(plane: DataPlane, text: str, prompt: Prompt | None = None, **fields: Any) -> GenerateOutput:
    says(plane, text)
    [output] = (await plane.generate(spec(prompt, **fields))).outputs
    return output


def called(output: Any) -> list[tuple[str, Mapping[str, Any]]]:
    return [(call.name, json.loads(call.arguments_json)) for call in output.tool_calls]


def joined(events: Sequence[StreamGenerateResponse], index: int = 0) -> GenerateOutput:
    output = GenerateOutput()
    for event in events:
        if event.HasField("delta") and event.delta.output_index == index:
            output.text += event.delta.text
            output.reasoning += event.delta.reasoning
            output.tool_calls.extend(event.delta.tool_calls)
            output.token_ids.extend(event.delta.token_ids)
        if event.HasField("finished") and event.finished.output_index == index:
            output.finished.CopyFrom(event.finished)
    return output


def prompt_of(plane: DataPlane) -> str:
    """The prompt that the engine got last."""
    return bytes(plane.engine.requests[-1].prompt_token_ids).decode()


async def test_a_call_comes_apart_from_the_text_and_the_reasoning(tools: DataPlane) -> None:
    output = await answer(tools, f"<think>\nHm.\n</think>\n\nI look.\n{CALL}")
    assert (output.text, output.reasoning) == ("I look.", "Hm.")
    assert called(output) == [("weather", {"days": 3})]
    assert output.finished.reason == FINISH_REASON_TOOL_CALLS


async def test_a_stream_says_the_same_in_pieces(tools: DataPlane) -> None:
    says(tools, f"<think>\nHm, hm.\n</think>\n\nI look.\n{CALL}\n{CALL}")
    output = joined(await tools.stream(spec()))
    assert (output.text, output.reasoning) == ("I look.", "Hm, hm.")
    assert called(output) == [("weather", {"days": 3})] * 2
    assert output.finished.reason == FINISH_REASON_TOOL_CALLS


async def test_reasoning_and_text_come_while_they_are_written(tools: DataPlane) -> None:
    says(tools, "<think>abc</think>def")
    tools.engine.steps_allowed = len("<think>ab")
    stream = tools.stub.StreamGenerate(StreamGenerateRequest(spec=spec()))
    reasoning = ""
    while reasoning != "ab":
        reasoning += (await next_of(stream)).delta.reasoning
    tools.engine.allow_steps(100)
    assert joined([event async for event in stream]).reasoning == "c"


async def test_each_output_and_each_item_of_a_batch_is_read_by_itself(tools: DataPlane) -> None:
    says(tools, CALL, "No.")
    outputs = (await tools.generate(spec(sampling={"n": 2}))).outputs
    assert sorted((output.text, len(output.tool_calls)) for output in outputs) == [("", 1), ("No.", 0)]
    says(tools, CALL, CALL)
    batch = [answer async for answer in tools.stub.BatchGenerate(BatchGenerateRequest(specs=[spec(), spec()]))]
    assert [len(item.response.outputs[0].tool_calls) for item in batch[1:]] == [1, 1]


@pytest.mark.parametrize("text", [OTHER, '<tool_call>\n{"name": "weather", "arg', CALL.replace("{", "[")])
async def test_what_is_no_call_of_an_offered_tool_is_text(tools: DataPlane, text: str) -> None:
    output = await answer(tools, text)
    assert (output.text, called(output)) == (text, [])
    assert output.finished.reason == FINISH_REASON_EOS


async def test_a_call_that_max_tokens_cuts_is_text(tools: DataPlane) -> None:
    whole = CALL.removesuffix("\n</tool_call>")  # its arguments are complete
    output = await answer(tools, CALL, stopping={"max_tokens": len(whole)})
    assert (output.text, called(output)) == (whole, [])
    assert output.finished.reason == FINISH_REASON_MAX_TOKENS


async def test_stop_strings_are_found_in_all_that_is_written(tools: DataPlane) -> None:
    output = await answer(tools, f"<think>a STOP b</think>{CALL}", stopping={"stop": ["STOP"]})
    assert (output.reasoning, output.text, called(output)) == ("a", "", [])
    assert output.finished.reason == FINISH_REASON_STOP
    assert output.finished.stop == "STOP"


async def test_a_call_before_a_stop_string_is_a_call(tools: DataPlane) -> None:
    output = await answer(tools, f"{CALL} and STOP", stopping={"stop": ["STOP"]})
    assert (output.text, called(output)) == ("and", [("weather", {"days": 3})])
    assert output.finished.reason == FINISH_REASON_STOP


async def test_without_parallel_calls_the_first_one_ends_the_output(tools: DataPlane) -> None:
    output = await answer(tools, f"Well.{CALL}\n{CALL}", chat(parallel_tool_calls=False))
    assert (output.text, called(output)) == ("Well.", [("weather", {"days": 3})])
    assert output.finished.reason == FINISH_REASON_TOOL_CALLS
    await tools.engine.until_idle()
    assert len(tools.engine.aborted) == 1


async def test_token_ids_are_all_tokens_with_those_of_the_marks(tools: DataPlane) -> None:
    says(tools, f"<think>a</think>{CALL}b")
    output = joined(await tools.stream(spec(output={"token_ids": True})))
    assert bytes(output.token_ids).decode() == f"<think>a</think>{CALL}b"


async def test_arguments_are_cast_as_the_schema_of_the_tool_says(tools: DataPlane) -> None:
    assert called(await answer(tools, CALL.replace("3", '"3"'))) == [("weather", {"days": 3})]


async def test_the_template_is_shown_the_tools(tools: DataPlane) -> None:
    await answer(tools, "", chat(tools=[WEATHER, Tool(name="now")]))
    shown = prompt_of(tools).partition("<tools>")[2].partition("</tools>")[0]
    functions = [tool["function"] for tool in json.loads(shown)]
    assert functions == [
        {"name": "weather", "description": "Looks.", "parameters": {"properties": {"days": {"type": "integer"}}}},
        {"name": "now", "parameters": {"type": "object", "properties": {}}},
    ]


async def test_with_mode_none_no_tool_is_shown_and_no_call_made(tools: DataPlane) -> None:
    output = await answer(tools, f"<think>a</think>{CALL}", chat(tool_choice={"mode": TOOL_MODE_NONE}))
    assert (output.reasoning, output.text, called(output)) == ("a", CALL, [])
    assert "<tools>" not in prompt_of(tools)


async def test_reasoning_comes_apart_without_tools(tools: DataPlane) -> None:
    output = await answer(tools, "<think>a</think>b", chat(tools=[]))
    assert (output.reasoning, output.text) == ("a", "b")


async def asked_grammar(plane: DataPlane, text: str, **fields: Any) -> str:
    """The grammar that the engine is told."""
    await answer(plane, text, chat(tools=[]), constraint={"regex": "[a-z]+"}, **fields)
    return plane.engine.requests[-1].grammar


async def test_a_form_begins_behind_the_reasoning(tools: DataPlane) -> None:
    behind = await asked_grammar(tools, "<think>Hm</think>abc")
    assert behind == behind_thought(regex_grammar("[a-z]+"), '("<think>" thought)?', thought_rules("</think>", {}))
    assert await asked_grammar(tools, "abc", output={"parse_message": False}) == regex_grammar("[a-z]+")


async def test_reasoning_that_the_template_has_opened_goes_on(tools: DataPlane) -> None:
    messages = [ChatMessage(role="assistant", content="<think>I know")]
    prompt = chat(messages=messages, continue_final_message=True)
    output = await answer(tools, " it.</think>Yes.", prompt)
    assert (output.reasoning, output.text) == (" it.", "Yes.")


async def test_each_output_goes_on_with_the_call_that_the_message_has_begun(tools: DataPlane) -> None:
    messages = [ChatMessage(role="assistant", content=CALL + CALL[:40])]
    says(tools, CALL[40:], CALL[40:].replace("3", "4"))
    asked = spec(chat(messages=messages, continue_final_message=True), sampling={"n": 2})
    outputs = (await tools.generate(asked)).outputs
    calls = sorted(arguments["days"] for output in outputs for _, arguments in called(output))
    assert (calls, [output.text for output in outputs]) == ([3, 4], ["", ""])


async def test_calls_that_are_required_of_a_search_are_read_from_each_output(tools: DataPlane) -> None:
    required = chat(tool_choice={"mode": TOOL_MODE_REQUIRED})
    says(tools, CALL, f"-{CALL}")
    await tools.generate(spec(required))
    search: dict[str, Any] = {"beam_search": {"num_beams": 2}, "sampling": {"n": 2}}
    best, second = (await tools.generate(spec(required, **search))).outputs
    alone, searched = tools.engine.requests
    assert searched.beams is not None
    assert searched.grammar == alone.grammar != ""
    assert (best.text, called(best), best.finished.reason) == (
        "-",
        [("weather", {"days": 3})],
        FINISH_REASON_TOOL_CALLS,
    )
    assert (second.text, called(second)) == ("", [("weather", {"days": 3})])  # without the first token of the best
    assert [output.finished.score for output in (best, second)] == [0.0, -1.0]


async def test_what_is_not_to_be_read_is_text(tools: DataPlane) -> None:
    text = f"<think>a</think> {CALL}"
    assert (await answer(tools, text, output={"parse_message": False})).text == text


async def test_what_a_model_answered_goes_into_the_next_request_as_it_is(tools: DataPlane) -> None:
    output = await answer(tools, f"<think>a</think>{CALL}")
    said = ChatMessage(role="assistant", content=output.text, reasoning_content=output.reasoning)
    said.tool_calls.extend(output.tool_calls)
    result = ChatMessage(role="tool", content="Sun.", tool_call_id=output.tool_calls[0].id)
    await answer(tools, "", chat(messages=[ChatMessage(role="user", content="Hi"), said, result]))
    assert "<think>a</think>" in prompt_of(tools)
    assert '<tool_call>{"name": "weather", "arguments": {"days": 3}}</tool_call>' in prompt_of(tools)


async def test_a_long_call_is_read_off_the_event_loop_as_any_other(tools: DataPlane) -> None:
    text = CALL.replace("3", '"' + "x" * 6_000 + '"')
    tools.engine.tokens_per_step = 3000
    output = await answer(tools, text, stopping={"max_tokens": 8_000})
    assert called(output) == [("weather", {"days": "x" * 6_000})]


REFUSED = {
    "a name with blanks": (chat(tools=[Tool(name="a b")]), "spec.prompt.chat.tools[0].name"),
    "no name": (chat(tools=[Tool()]), "spec.prompt.chat.tools[0].name"),
    "a name twice": (chat(tools=[WEATHER, WEATHER]), "spec.prompt.chat.tools"),
    "a choice of nothing": (chat(tool_choice={}), "spec.prompt.chat.tool_choice"),
    "another tool": (chat(tool_choice={"name": "x"}), "spec.prompt.chat.tool_choice.name"),
    "none to require": (chat(tools=[], tool_choice={"mode": TOOL_MODE_REQUIRED}), "spec.prompt.chat.tool_choice.mode"),
    "an unknown mode": (chat(tool_choice={"mode": 9}), "spec.prompt.chat.tool_choice.mode"),
    "no JSON": (chat(tools=[Tool(name="a", parameters_json="{")]), "spec.prompt.chat.tools[0].parameters_json"),
    "no object": (chat(tools=[Tool(name="a", parameters_json="[]")]), "spec.prompt.chat.tools[0].parameters_json"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_offered_is_refused_by_its_place(tools: DataPlane, name: str) -> None:
    prompt, field = REFUSED[name]
    refused = await failure(tools.generate(spec(prompt)))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": Prompt(text="a"), "output": {"parse_message": True}}, "spec.output.parse_message"),
        ({"output": {"parse_message": True, "text": False}}, "spec.output.parse_message"),
        (
            {
                "prompt": chat(tool_choice={"mode": TOOL_MODE_REQUIRED}),
                "constraint": {"regex": "a"},
            },
            "spec.constraint",
        ),
    ],
)
async def test_what_does_not_go_together_is_refused(tools: DataPlane, fields: dict[str, Any], field: str) -> None:
    assert (await failure(tools.generate(spec(**fields)))).fields == [field]


@pytest.mark.parametrize(
    ("template", "fields", "field"),
    [
        ("<|im_start|><tool_call>", {}, "spec.prompt.chat.tools"),  # shows none
        (
            "{{ 'ab' if tools else 'c' }}",
            {},
            "spec.prompt.chat.tools",
        ),  # shows them, and nobody knows how the model calls them
        (
            "{{ 'ab' if tools else 'c' }}",
            {"prompt": chat(tools=[]), "output": {"parse_message": True}},
            "spec.output.parse_message",
        ),
    ],
)
async def test_a_model_that_cannot_is_not_asked(
    byte_tokenizer_directory: Path, tmp_path: Path, template: str, fields: dict[str, Any], field: str
) -> None:
    async with data_plane(with_template(byte_tokenizer_directory, tmp_path, template)) as plane:
        plane.endless()
        assert (await failure(plane.generate(spec(**fields)))).fields == [field]


async def test_a_caller_who_reads_calls_himself_may_offer_tools_to_any_template_that_shows_them(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    async with data_plane(with_template(byte_tokenizer_directory, tmp_path, "{{ 'ab' if tools else 'c' }}")) as plane:
        plane.endless()
        assert (await answer(plane, "CALL x", output={"parse_message": False})).text == "CALL x"


async def test_a_response_template_that_cannot_be_followed_is_named(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    declared = {"start_anchor": "x", "fields": {"tool_calls": {"open": "a", "content": "bogus"}}}
    tokenizer = with_template(byte_tokenizer_directory, tmp_path, TEMPLATE, response_template=declared)
    async with data_plane(tokenizer) as plane:
        plane.endless()
        refused = await failure(plane.generate(spec()))
    assert refused.fields == ["spec.output.parse_message"]
    assert "unknown content parser 'bogus'" in refused.message


async def test_a_special_token_that_marks_a_call_is_read_and_others_are_left_out(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    backend = json.loads((byte_tokenizer_directory / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    marks = ["<tool_call>", "</tool_call>", "<other>"]
    backend["added_tokens"] += [{"id": 258 + n, "content": mark, **special} for n, mark in enumerate(marks)]
    tokenizer = with_template(byte_tokenizer_directory, tmp_path, TEMPLATE)
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = Tokenizer.load(tmp_path)
    async with data_plane(tokenizer) as plane:
        plane.endless()
        limits = msgspec.structs.replace(plane.models.models["demo"].limits, vocab_size=261)
        plane.models.models["demo"] = replace(plane.models.models["demo"], limits=limits)
        body = b'{"name": "weather", "arguments": {}}'
        plane.engine.scripts.append([*b"a", 260, *b"b", 258, *body, 259, EOS])
        [output] = (await plane.generate(spec())).outputs
    assert (output.text, called(output)) == ("ab", [("weather", {})])


async def test_a_history_of_calls_must_be_of_json_objects(tools: DataPlane) -> None:
    call = ToolCall(id="1", name="weather", arguments_json="[]")
    messages = [ChatMessage(role="assistant", tool_calls=[call])]
    refused = await failure(tools.generate(spec(chat(messages=messages))))
    assert refused.fields == ["spec.prompt.chat.messages[0].tool_calls[0].arguments_json"]
