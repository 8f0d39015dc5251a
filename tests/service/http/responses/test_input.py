"""The items of OpenAI's Responses become messages, or are refused with their place."""

from typing import Any

import pytest

from loraplex.v1.prompt_pb2 import Chat, ChatMessage
from loraplex_service.http.failures import Refusal
from loraplex_service.http.responses.table import RESPONSES

TOOL = {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": False}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}],
}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "now", "arguments": "{}", "status": "completed"}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "five"}
USER = {"role": "user", "content": [{"type": "input_text", "text": "and"}]}


def chat_of(*given: Any, **parameters: Any) -> Chat:
    chat: Chat = RESPONSES.read({"input": list(given), **parameters}).message.prompt.chat
    return chat


def test_a_text_is_what_the_user_says() -> None:
    draft = RESPONSES.read({"input": "hi", "instructions": "be brief"})
    said = [(message.role, message.content) for message in draft.message.prompt.chat.messages]
    assert said == [("system", "be brief"), ("user", "hi")]


def test_what_an_assistant_thought_said_and_called_is_one_message() -> None:
    user, answer, result = chat_of(USER, THOUGHT, SAID, CALL, RESULT).messages
    assert user == ChatMessage(role="user", content="and")
    assert (answer.role, answer.reasoning_content, answer.content) == ("assistant", "hm", "so")
    assert [(call.id, call.name, call.arguments_json) for call in answer.tool_calls] == [("a", "now", "{}")]
    assert result == ChatMessage(role="tool", tool_call_id="a", content="five")


def test_calls_of_one_turn_are_of_one_message() -> None:
    calls, *results = chat_of(CALL, {**CALL, "call_id": "b"}, RESULT, {**RESULT, "call_id": "b"}).messages
    assert [call.id for call in calls.tool_calls] == ["a", "b"]
    assert [result.tool_call_id for result in results] == ["a", "b"]


def test_messages_of_an_assistant_stay_apart() -> None:
    assert [message.content for message in chat_of(SAID, SAID).messages] == ["so", "so"]


def test_a_summary_is_read_where_thoughts_are_not_there() -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}], "encrypted_content": None}
    [message] = chat_of(thought).messages
    assert message.reasoning_content == "short"


def test_a_field_leads_back_to_its_item() -> None:
    draft = RESPONSES.read({"instructions": "s", "input": [THOUGHT, SAID, USER]})
    assert draft.named("prompt.chat.messages[0].content") == "instructions.content"
    assert draft.named("prompt.chat.messages[2].content") == "input[2].content"


def test_a_call_leads_back_to_its_item() -> None:
    draft = RESPONSES.read({"input": [THOUGHT, SAID, CALL, RESULT]})
    assert draft.named("prompt.chat.messages[0].content") == "input[1].content"
    assert draft.named("prompt.chat.messages[0].tool_calls[0].arguments_json") == "input[2].arguments"
    assert draft.named("prompt.chat.messages[1].tool_call_id") == "input[3].call_id"


def test_what_others_found_in_a_text_is_no_part_of_a_prompt() -> None:
    [message] = chat_of(
        {**SAID, "content": [{"type": "output_text", "text": "x", "annotations": [{"url": "u"}]}]}
    ).messages
    assert message.content == "x"


def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is() -> None:
    assert RESPONSES.read({"max_output_tokens": 64_000}).message.stopping.fit_max_tokens


def test_what_asks_for_nothing_here_is_taken() -> None:
    given = {"stream": True, "stream_options": {"include_obfuscation": True}, "reasoning": {"summary": "detailed"}}
    assert RESPONSES.read(given).message == RESPONSES.read({}).message


def test_what_another_model_would_not_do_can_be_sent_back() -> None:
    [message] = chat_of({**SAID, "content": [{"type": "refusal", "refusal": "no"}]}).messages
    assert message.content == "no"


def test_a_schema_leads_back_to_its_format() -> None:
    draft = RESPONSES.read({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}})
    assert draft.named("constraint.json_schema") == "text.format.schema"


def test_a_form_is_flat() -> None:
    form = {"type": "json_schema", "name": "x", "strict": True, "schema": {"type": "object"}}
    assert RESPONSES.read({"text": {"format": form}}).message.constraint.json_schema == '{"type": "object"}'


def test_a_choice_may_name_a_tool() -> None:
    chat = chat_of(tools=[TOOL], tool_choice={"type": "function", "name": "now"})
    assert (chat.tools[0].name, chat.tool_choice.name) == ("now", "now")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0]"),
        ({"input": [{**CALL, "namespace": "x"}]}, "input[0].namespace"),
        ({"input": [{"no": "such"}]}, "input[0]"),
        ({"input": [RESULT]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0]"),
        ({"input": [THOUGHT, CALL, USER]}, "input[1]"),
        ({"input": [{**CALL, "name": ""}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{**THOUGHT, "content": "x" * (1 << 20)}] * 3}, "input[2]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "strict": "yes"}]}, "tools[0]"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "text", "bogus": 1}}}, "text.format.bogus"),
        ({"text": {"format": {"type": "json_schema", "schema": {}, "bogus": 1}}}, "text.format.bogus"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"loraplex": {"model": "x"}}, "loraplex.model"),
        ({"loraplex": {"prompt": {"text": "x"}}}, "loraplex.prompt.text"),
        ({"loraplex": {"prompt": {"chat": {"messages": [{"role": "user"}]}}}}, "loraplex.prompt.chat.messages"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text"),
        ({"stream_options": {"include_usage": True}, "stream": True}, "stream_options.include_usage"),
        ({"stream_options": {}}, "stream_options"),
        ({"loraplex": {"sampling": {"n": 2}}}, "loraplex.sampling.n"),
        ({"loraplex": {"output": {"promptLogprobs": 0}}}, "loraplex.output.prompt_logprobs"),
    ],
)
def test_what_there_is_nothing_for_is_refused_with_its_place(given: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as raised:
        RESPONSES.read(given)
    assert (raised.value.status, raised.value.param) == (400, param)
