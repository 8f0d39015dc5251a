"""Anthropic's turns and tools become those of the contract, or are refused with their place."""

from typing import Any

import pytest

from loraplex.v1.prompt_pb2 import Chat, ChatMessage, ToolMode
from loraplex_service.http.failures import Refusal
from loraplex_service.http.messages.table import COUNT, MESSAGES

TOOL = {"name": "now", "input_schema": {"type": "object"}, "description": "tells the time"}


CACHED = "messages[0].content[0].cache_control"


def chat_of(*turns: Any, **parameters: Any) -> Chat:
    chat: Chat = MESSAGES.read({"messages": list(turns), **parameters}).message.prompt.chat
    return chat


def refusal_of(**parameters: Any) -> Refusal:
    with pytest.raises(Refusal) as raised:
        MESSAGES.read(parameters)
    assert raised.value.status == 400
    return raised.value


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


TEXT = {"type": "text", "text": "and", "cache_control": {"type": "ephemeral"}}
CALL = {"type": "tool_use", "id": "a", "name": "now", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "five"}]}


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    call = {"type": "tool_use", "id": "a", "name": "now", "input": {"zone": "é"}}
    [message] = chat_of(assistant(thought, {"type": "text", "text": "so", "citations": None}, call)).messages
    assert (message.role, message.content, message.reasoning_content) == ("assistant", "so", "hm")
    assert (message.tool_calls[0].id, message.tool_calls[0].arguments_json) == ("a", '{"zone": "é"}')


def test_results_of_tools_are_messages_of_their_own() -> None:
    messages = chat_of(assistant(CALL), user(RESULT, TEXT)).messages[1:]
    result = ChatMessage(role="tool", tool_call_id="a", content="five")
    assert list(messages) == [result, ChatMessage(role="user", content="and")]
    assert [message.role for message in chat_of(assistant(CALL), user(TEXT, RESULT)).messages][1:] == [
        "user",
        "tool",
    ]


def test_a_tool_that_failed_is_told_so() -> None:
    _, message = chat_of(assistant(CALL), user({**RESULT, "is_error": True})).messages
    assert message.content == "Error: five"


def test_a_result_may_be_empty() -> None:
    _, message = chat_of(assistant(CALL), user({"type": "tool_result", "tool_use_id": "a"})).messages
    assert (message.content, message.HasField("content")) == ("", True)


def test_the_system_speaks_first() -> None:
    messages = chat_of(user(TEXT), system=[{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]).messages
    assert (messages[0].role, messages[0].content, messages[1].role) == ("system", "be brief", "user")


def test_an_assistants_turn_at_the_end_is_left_open() -> None:
    assert chat_of(user(TEXT), {"role": "assistant", "content": "So"}).continue_final_message
    call = {"type": "tool_use", "id": "a", "name": "now", "input": {}}
    assert not chat_of(user(TEXT), assistant(call)).HasField("continue_final_message")


@pytest.mark.parametrize(
    ("choice", "mode"),
    [("auto", ToolMode.TOOL_MODE_AUTO), ("any", ToolMode.TOOL_MODE_REQUIRED), ("none", ToolMode.TOOL_MODE_NONE)],
)
def test_a_choice_of_tools_has_the_same_meaning(choice: str, mode: ToolMode.ValueType) -> None:
    chat = chat_of(tools=[TOOL], tool_choice={"type": choice})
    assert (chat.tool_choice.mode, chat.HasField("parallel_tool_calls")) == (mode, False)


def test_a_choice_may_name_a_tool_and_allow_one_call() -> None:
    chosen = {"type": "tool", "name": "now", "disable_parallel_tool_use": True}
    chat = chat_of(tools=[TOOL], tool_choice=chosen)
    assert (chat.tool_choice.name, chat.parallel_tool_calls) == ("now", False)
    assert chat.tools[0].description == "tells the time"


def test_thinking_is_a_variable_of_the_template() -> None:
    thinking = {"type": "enabled", "display": "omitted", "budget_tokens": 1024}
    draft = MESSAGES.read({"thinking": thinking})
    assert draft.message.prompt.chat.template_kwargs["enable_thinking"] is True
    assert not draft.include_reasoning


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"metadata": {"user": "me"}}, "metadata.user"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**TOOL, "strict": "yes"}]}, "tools[0]"),
        ({"tools": [{"name": "now"}]}, "tools[0]"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}, "junk": 1}}}, "output_config.format.junk"),
        ({"output_config": {"task_budget": 1}}, "output_config.task_budget"),
        ({"loraplex": {"sampling": {"n": 2}}}, "loraplex.sampling.n"),
        ({"loraplex": {"output": {"logprobs": True}}}, "loraplex.output.logprobs"),
        ({"messages": [user({"type": "image", "source": {}})]}, "messages[0].content[0].type"),
        ({"messages": [assistant({"type": "redacted_thinking", "data": "x"})]}, "messages[0].content[0].type"),
        ({"messages": [user({"type": "tool_use"})]}, "messages[0].content[0].type"),
        ({"messages": [user({**TEXT, "citations": [1]})]}, "messages[0].content[0].citations"),
        ({"messages": [user({**RESULT, "content": [{"type": "image"}]})]}, "messages[0].content[0].content[0].type"),
        ({"messages": [user({"type": "tool_result"})]}, "messages[0].content[0]"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0]"),
        ({"messages": [assistant({**CALL, "input": "{}"})]}, "messages[0].content[0]"),
        ({"messages": [assistant({**CALL, "name": ""})]}, "messages[0].content[0]"),
        ({"messages": [user(RESULT)]}, "messages[0].content[0]"),
        ({"messages": [user(RESULT), assistant(CALL)]}, "messages[0].content[0]"),
        ({"messages": [assistant(TEXT, CALL), user(TEXT)]}, "messages[0].content[1]"),
        ({"messages": [user({**TEXT, "cache_control": {"type": "ephemeral", "ttl": "9y"}})]}, CACHED),
        ({"messages": [user({**TEXT, "cache_control": {"type": "ephemeral", "scope": "all"}})]}, f"{CACHED}.scope"),
        ({"messages": [user(*[{**TEXT, "text": "x" * (1 << 20)}] * 3)]}, "messages[0].content[2]"),
        ({"messages": [user()]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"messages": [user(*[RESULT] * 1000), user(*[RESULT] * 1000)]}, "messages[1]"),
    ],
)
def test_what_there_is_nothing_for_is_refused_with_its_place(given: dict[str, Any], param: str) -> None:
    assert refusal_of(**given).param == param


def test_a_field_leads_back_to_its_block() -> None:
    draft = MESSAGES.read({"system": "s", "messages": [assistant(TEXT, CALL), user(RESULT)]})
    assert draft.named("prompt.chat.messages[1].tool_calls[0].arguments_json") == "messages[0].content[1].input"
    assert draft.named("prompt.chat.messages[2].content") == "messages[1].content[0].content"


def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is_unless_the_caller_says_no() -> None:
    assert MESSAGES.read({"max_tokens": 64_000}).message.stopping.fit_max_tokens
    strictly = {"max_tokens": 64_000, "loraplex": {"stopping": {"fitMaxTokens": False}}}
    assert not MESSAGES.read(strictly).message.stopping.fit_max_tokens


def test_a_schema_is_where_the_api_has_it() -> None:
    draft = MESSAGES.read({"tools": [TOOL, {**TOOL, "strict": True}]})
    assert draft.named("prompt.chat.tools[1].parameters_json") == "tools[1].input_schema"
    assert draft.named("prompt.chat.tools[0].name") == "tools[0].name"


def test_a_count_reads_what_a_message_reads() -> None:
    parameters = {"messages": [user(TEXT)], "system": "be brief", "tools": [TOOL], "tool_choice": {"type": "none"}}
    assert COUNT.read(parameters).message.prompt == MESSAGES.read(parameters).message.prompt
