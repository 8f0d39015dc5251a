"""Every parameter of every endpoint becomes what its table says, or is refused by name."""

import json
from typing import Any

import pytest

from loraplex.v1.prompt_pb2 import ToolMode
from loraplex_service.http.dialects import TABLES
from loraplex_service.http.failures import Refusal
from loraplex_service.http.parameters import Parameter, Table, place
from loraplex_service.http.responses.table import RESPONSES
from loraplex_service.http.tables import CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
NOW = {"type": "function", "function": {"name": "now"}}
VALUES: dict[str, Any] = {  # of parameters that take no number
    "loraplex": {"drafts": {"draftKind": "DRAFT_KIND_OFF"}},
    "model": "tiny",
    "logit_bias": {"7": 1.5},
    "stop": "x",
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_object"},
    "user": "me",
    "safety_identifier": "me",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "stop_token_ids": [1],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "add_special_tokens": False,
    "cache_salt": "s",
    "request_id": "r",
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": 'root ::= "a"',
    "structured_outputs": {"regex": "a+", "json": None},
    "messages": [{"role": "user", "content": "x"}],
    "tools": [TOOL],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "documents": [{"title": "x"}],
    "reasoning_effort": "low",
    "include_reasoning": False,
    "prompt": "x",
    "echo": True,
    "input": ["x"],
    "encoding_format": "base64",
    "normalize": False,
    "tokens": [1, 2],
}
FUNCTION = {"name": "now", "input_schema": {"type": "object"}}
OWN: dict[str, dict[str, Any]] = {  # of parameters that other endpoints have with other values
    "/v1/messages": {
        "metadata": {"user_id": "me"},
        "tools": [FUNCTION],
        "tool_choice": {"type": "any"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        "system": "be brief",
        "stop_sequences": ["x"],
        "thinking": {"type": "disabled"},
    },
}
OWN["/v1/responses"] = {
    "input": "hello",
    "instructions": "be brief",
    "tools": [{"type": "function", "name": "now", "parameters": {"type": "object"}}],
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "stream_options": {"include_obfuscation": False},
}
OWN["/api/v1/asample"] = {
    "base_model": "tiny",
    "model_path": "tinker://tenants/shared/adapters/pirate",
    "sampling_session_id": "sampler-dGlueQ",
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "sampling_params": {"max_tokens": 3, "temperature": 0.5, "top_k": -1, "stop": ["x"], "seed": 1},
    "prompt_logprobs": True,
}
OWN["/api/v1/create_sampling_session"] = {"base_model": "tiny", "model_path": "tinker://pirate", "session_id": "s"}
OWN["/v1/load_lora_adapter"] = {"lora_name": "a", "lora_path": "/a", "base_model_name": "tiny", "load_inplace": True}
OWN["/v1/unload_lora_adapter"] = {"lora_name": "a"}
OWN["/v1/messages/count_tokens"] = OWN["/v1/messages"]
EACH = [(table, parameter) for table in TABLES for parameter in table.parameters]
TAKEN = [pytest.param(*each, id=f"{each[0].path} {each[1].name}") for each in EACH if each[1].taken]
REFUSED = [pytest.param(*each, id=f"{each[0].path} {each[1].name}") for each in EACH if not each[1].taken]


def value_of(table: Table, parameter: Parameter) -> Any:
    value = True if parameter.name == "logprobs" and table is CHAT else VALUES.get(parameter.name, 1)
    return OWN.get(table.path, {}).get(parameter.name, value)


def body_for(table: Table, parameter: Parameter) -> dict[str, Any]:
    """A body with the parameter, and with what it needs beside it."""
    beside: dict[str, Any] = {"input": "x"} if table is EMBEDDINGS else {}
    if parameter.name == "stream_options":
        beside["stream"] = True
    return {**beside, parameter.name: value_of(table, parameter)}


def said(content: Any) -> dict[str, Any]:
    """A message."""
    return {"role": "user", "content": content}


def called(more: dict[str, Any], **function: Any) -> dict[str, Any]:
    """A message with a call of a tool that has more keys than it may."""
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"} | function}
    return {"role": "assistant", "tool_calls": [call | more]}


def is_there(message: Any, path: str) -> bool:
    holder, name = place(message, path)
    descriptor = holder.DESCRIPTOR.fields_by_name[name]
    return bool(getattr(holder, name)) or (descriptor.has_presence and holder.HasField(name))


@pytest.mark.parametrize(("table", "parameter"), TAKEN)
def test_a_parameter_becomes_what_its_table_says(table: Table, parameter: Parameter) -> None:
    draft = table.read(body_for(table, parameter))
    path = "" if (table, parameter.name) == (COMPLETIONS, "prompt") else parameter.becomes
    assert not path or is_there(draft.message, path)
    empty = table.read(body_for(table, parameter) | {parameter.name: None})
    assert draft != empty, "it changes nothing"


@pytest.mark.parametrize(("table", "parameter"), REFUSED)
def test_what_there_is_nothing_for_is_refused_by_name(table: Table, parameter: Parameter) -> None:
    with pytest.raises(Refusal) as raised:
        table.read({parameter.name: "something"})
    assert (raised.value.status, raised.value.param) == (400, parameter.name)
    assert raised.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("name", "value"),
    [("store", False), ("service_tier", "auto"), ("length_penalty", 1), ("modalities", ["text"]), ("echo", False)],
)
def test_a_value_that_asks_for_nothing_is_taken(name: str, value: Any) -> None:
    assert CHAT.read({name: value}).message == CHAT.read({}).message


@pytest.mark.parametrize(("table", "parameter"), TAKEN)
def test_a_value_of_a_wrong_type_is_refused_with_the_name_of_its_parameter(table: Table, parameter: Parameter) -> None:
    value = 7 if parameter.name == "documents" else [{"no": "such"}]
    with pytest.raises(Refusal) as raised:
        table.read(body_for(table, parameter) | {parameter.name: value})
    assert str(raised.value.param).startswith(parameter.name.removesuffix("_options"))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_a_parameter_that_does_not_exist_is_refused(table: Table) -> None:
    with pytest.raises(Refusal) as raised:
        table.read({"temprature": 1})
    assert (raised.value.param, raised.value.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_null_is_as_nothing(table: Table) -> None:
    nothing = table.read({})
    assert table.read({parameter.name: None for parameter in table.parameters}) == nothing


def test_a_number_too_large_for_its_field_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match="seed") as raised:
        CHAT.read({"seed": -1})
    assert raised.value.param == "seed"


def test_a_schema_keeps_the_order_of_its_keys() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert json.loads(CHAT.read({"response_format": form}).message.constraint.json_schema) == schema


def test_two_forms_are_refused() -> None:
    with pytest.raises(Refusal, match="another parameter asks for a form") as raised:
        CHAT.read({"response_format": {"type": "json_object"}, "guided_regex": "a"})
    assert raised.value.param == "guided_regex"


def test_an_echo_of_a_prompt_that_is_cut_is_refused() -> None:
    with pytest.raises(Refusal, match="truncate_prompt_tokens") as raised:
        COMPLETIONS.read({"prompt": "abc", "echo": True, "truncate_prompt_tokens": 1})
    assert raised.value.param == "echo"


@pytest.mark.parametrize(
    ("table", "given", "param"),
    [
        (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        (CHAT, {"loraplex": {"output": {"logprobTokenIds": [1]}}}, "loraplex.output.logprobTokenIds"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"stream": False, "stream_options": {}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (
            CHAT,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (CHAT, {"structured_outputs": {}}, "structured_outputs"),
        (CHAT, {"messages": [said([{"type": "text", "text": "x", "lang": "en"}])]}, "messages[0].content[0].lang"),
        (CHAT, {"messages": [called({"strict": True})]}, "messages[0].tool_calls[0].strict"),
        (CHAT, {"messages": [called({}, output="x")]}, "messages[0].tool_calls[0].function.output"),
        (CHAT, {"tools": [TOOL | {"strict": True}]}, "tools[0].strict"),
        (CHAT, {"tools": [TOOL], "tool_choice": NOW | {"strict": True}}, "tool_choice.strict"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (CHAT, {"structured_outputs": {"json": None}}, "structured_outputs"),
    ],
)
def test_what_would_be_passed_over_is_refused(table: Table, given: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as raised:
        table.read(given)
    assert (raised.value.status, raised.value.param) == (400, param)


@pytest.mark.parametrize("other", [{}, {"reasoning_content": None}])
def test_reasoning_goes_by_either_name(other: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": "x", "reasoning": "hm"}
    [message] = CHAT.read({"messages": [said | other]}).message.prompt.chat.messages
    assert message.reasoning_content == "hm"


def test_what_asks_for_a_cache_is_taken() -> None:
    """What prompts begin with is cached without being asked."""
    marks = {"prompt_cache_breakpoint": {"mode": "explicit"}, "cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "x"}
    assert CHAT.read({"messages": [said([part | marks])]}) == CHAT.read({"messages": [said([part])]})


def test_a_call_that_was_put_together_from_a_stream_can_be_sent_back() -> None:
    [message] = CHAT.read({"messages": [called({"index": 0})]}).message.prompt.chat.messages
    assert message.tool_calls[0].name == "now"


def test_two_lengths_are_refused() -> None:
    assert CHAT.read({"max_tokens": 3, "max_completion_tokens": 3}).message.stopping.max_tokens == 3
    with pytest.raises(Refusal) as raised:
        CHAT.read({"max_tokens": 4, "max_completion_tokens": 3})
    assert raised.value.param == "max_tokens"


def test_completions_have_sixteen_tokens_by_default_as_openai_has_it() -> None:
    assert COMPLETIONS.read({}).message.stopping.max_tokens == 16
    assert not CHAT.read({}).message.stopping.HasField("max_tokens")


def test_a_tool_choice_may_name_a_tool() -> None:
    assert CHAT.read({"tools": [TOOL], "tool_choice": NOW}).message.prompt.chat.tool_choice.name == "now"


def test_a_strict_tool_is_a_tool_as_any_other() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    required = CHAT.read({"tools": [TOOL, strict], "tool_choice": "required"})
    assert required.message.prompt.chat.tool_choice.mode == ToolMode.TOOL_MODE_REQUIRED
    offered = CHAT.read({"tools": [TOOL, strict]})
    assert offered.message.prompt.chat.tools[0] == offered.message.prompt.chat.tools[1]
    assert offered.named("prompt.chat.tools[1].parameters_json") == "tools[1].function.parameters"


def test_any_text_is_no_form_beside_calls_that_are_required() -> None:
    asked = {"tools": [TOOL], "response_format": {"type": "text"}}
    assert not CHAT.read(asked | {"tool_choice": "required"}).message.HasField("constraint")
    assert CHAT.read(asked | {"tool_choice": "auto"}).message.constraint.HasField("any_text")


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]}
    [message] = CHAT.read({"messages": [said | {"reasoning_content": "hm"}]}).message.prompt.chat.messages
    assert (message.role, message.reasoning_content, message.tool_calls[0].id) == ("assistant", "hm", "c1")
    assert not message.HasField("content")


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": {"url": "x"}}], 7, [7]])
def test_a_message_that_is_no_text_is_refused_with_its_place(content: Any) -> None:
    with pytest.raises(Refusal) as raised:
        CHAT.read({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": content}]})
    assert raised.value.param == "messages[1]"


def test_the_path_of_a_field_leads_back_to_the_parameter_that_gave_it() -> None:
    draft = CHAT.read({"messages": VALUES["messages"], "guided_regex": "a", "max_completion_tokens": 3})
    assert draft.named("prompt.chat.messages[0].content") == "messages[0].content"
    assert draft.named("constraint.regex") == "guided_regex"
    assert draft.named("stopping.max_tokens") == "max_completion_tokens"
    assert draft.named("stopping.max_tokens_of_others") is None
    assert draft.named("sampling.top_p") is None


def test_tokens_of_a_conversation_take_its_tools() -> None:
    draft = TOKENIZE.read({"messages": VALUES["messages"], "tools": [TOOL]})
    assert draft.message.prompt.chat.tools[0].name == "now"


def test_of_a_body_only_what_its_answer_repeats_is_kept() -> None:
    kept = {table.path: set(table.read({"model": "tiny", "user": "me"}).given) for table in (CHAT, RESPONSES)}
    assert kept == {CHAT.path: set(), RESPONSES.path: {"user"}}
    assert RESPONSES.read({"input": "x"}).given == {}
