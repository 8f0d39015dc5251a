"""Prompts from text, token ids and chat messages."""

from typing import Any

import pytest

from loraplex.prompts import Message, assistant_message, build_message, build_prompt, build_tool
from loraplex.v1 import inference_pb2, prompt_pb2


def test_text() -> None:
    assert build_prompt("Once").text == "Once"


def test_integers_are_token_ids() -> None:
    assert list(build_prompt([1, 2, 3]).token_ids.ids) == [1, 2, 3]


def test_mappings_and_messages_are_chat() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be kind"},
        prompt_pb2.ChatMessage(role="user", content="Hi"),
    ]
    prompt = build_prompt(messages)
    assert [(message.role, message.content) for message in prompt.chat.messages] == [
        ("system", "Be kind"),
        ("user", "Hi"),
    ]


def test_a_prompt_is_taken_as_it_is() -> None:
    prompt = prompt_pb2.Prompt(text="Once", truncate_to_tokens=3)
    assert build_prompt(prompt) == prompt


def test_an_empty_sequence_could_mean_either() -> None:
    with pytest.raises(ValueError, match="empty sequence"):
        build_prompt([])


def test_token_ids_and_messages_do_not_mix() -> None:
    mixed: Any = [1, {"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="mixes"):
        build_prompt(mixed)


def test_absent_content_is_not_empty_content() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    message = build_message({"role": "assistant", "tool_calls": [call]})
    assert not message.HasField("content")
    assert message.tool_calls[0] == prompt_pb2.ToolCall(id="c1", name="look", arguments_json='{"at": 1}')
    assert build_message({"role": "user", "content": ""}).HasField("content")


def test_arguments_of_a_call_may_be_an_object() -> None:
    message = build_message({"role": "assistant", "tool_calls": [{"id": "c1", "name": "look", "arguments": {"at": 1}}]})
    assert message.tool_calls[0].arguments_json == '{"at": 1}'


@pytest.mark.parametrize("tool", [{"name": "look"}, {"type": "function", "function": {"name": "look"}}])
def test_tools_in_either_form(tool: dict[str, Any]) -> None:
    assert build_tool(tool) == prompt_pb2.Tool(name="look")


def test_keys_that_no_message_has_are_named() -> None:
    with pytest.raises(ValueError, match="no key contents"):
        build_message({"role": "user", "contents": "Hi"})


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]
    assert build_message({"role": "user", "content": parts}).content == "Once upon"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"content\[1\] is of type '{kind}'"):
        build_message({"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": kind, kind: {}}]})


@pytest.mark.parametrize("content", [7, b"x", {"type": "text"}, [7], ["text"], [{"text": "x"}]])
def test_content_is_text_or_a_list_of_parts(content: Any) -> None:
    with pytest.raises(TypeError):
        build_message({"role": "user", "content": content})


def test_an_output_is_the_assistants_next_message() -> None:
    call = prompt_pb2.ToolCall(id="c1", name="look", arguments_json="{}")
    output = inference_pb2.GenerateOutput(text="Yes.", reasoning="Hm.", tool_calls=[call])
    assert assistant_message(output) == prompt_pb2.ChatMessage(
        role="assistant", content="Yes.", reasoning_content="Hm.", tool_calls=[call]
    )
    assert not assistant_message(inference_pb2.GenerateOutput(text="Yes.")).HasField("reasoning_content")
