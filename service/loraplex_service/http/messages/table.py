"""The parameters of Anthropic's endpoints: what they become in the contract, or why they are refused."""

from typing import Any

from loraplex.v1.tokenizer_pb2 import TokenizeRequest
from loraplex_service.http import conversations as said
from loraplex_service.http.failures import anthropic_error
from loraplex_service.http.messages.turns import check_cache_control, put_system, put_tool_choice, put_tools, put_turns
from loraplex_service.http.options import MODEL, SPEC, check_single, constrain, form_of, new_turn, put_stream
from loraplex_service.http.parameters import (
    ARRAY,
    BOOLEAN,
    OBJECT,
    STRING_OR_ARRAY,
    Draft,
    Parameter,
    Table,
    listing,
    mapping,
    refuse_others,
    refused,
    scalar,
    text,
    whole,
    wrong,
)

# Of OutputOptions.
UNTOLD = ("logprobs", "top_logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids", "logprob_token_ids")


def _put_metadata(draft: Draft, value: Any) -> None:
    refuse_others(mapping(value), ("user_id",), "metadata")
    if value.get("user_id") is not None:
        draft.message.labels["user_id"] = text(value["user_id"])
        draft.paths.append(("labels[user_id]", "metadata.user_id"))


def _put_thinking(draft: Draft, value: Any) -> None:
    refuse_others(mapping(value), ("type", "display", "budget_tokens"), "thinking")
    if value.get("type") not in ("enabled", "adaptive", "disabled"):
        raise ValueError('type must be "enabled", "adaptive" or "disabled"')
    if value.get("budget_tokens") is not None and whole(value["budget_tokens"]) < 1:
        raise wrong("thinking.budget_tokens", "must be at least 1")
    if value.get("display") not in (None, "summarized", "omitted"):
        raise ValueError('display must be "summarized" or "omitted"')
    said.set_variable(draft, "enable_thinking", value["type"] != "disabled")
    draft.include_reasoning = value.get("display") != "omitted"


def _put_effort(draft: Draft, value: Any) -> None:
    refuse_others(mapping(value), ("effort", "format"), "output_config")
    if value.get("effort") is not None:
        said.put_reasoning_effort(draft, value["effort"])
    if value.get("format") is not None:
        form = mapping(value["format"])
        refuse_others(form, ("type", "schema"), "output_config.format")
        if form.get("type") != "json_schema":
            raise ValueError('format.type must be "json_schema"')
        mapping(form.get("schema"))


def _put_output_config(draft: Draft, value: Any) -> None:
    _put_effort(draft, value)
    if value.get("format") is not None:
        where = "output_config.format"
        draft.paths += [("constraint", where), ("constraint.json_schema", f"{where}.schema")]
        constrain(draft, form_of("json", value["format"]["schema"]))


def _put_cache_control(draft: Draft, value: Any) -> None:
    check_cache_control(value, "cache_control")


def _new_count() -> Draft:
    draft = Draft(TokenizeRequest())
    said.begin(draft)
    return draft


_CONVERSATION = (
    Parameter("system", "prompt.chat.messages", put_system, "a text, or blocks of text", schema=STRING_OR_ARRAY),
    Parameter(
        "messages", "prompt.chat.messages", put_turns, "texts, thoughts, calls of tools and their results", schema=ARRAY
    ),
    Parameter(
        "tools", "prompt.chat.tools", put_tools, "`strict` counts where `tool_choice` requires calls", schema=ARRAY
    ),
    Parameter("tool_choice", "prompt.chat.tool_choice", put_tool_choice, schema=OBJECT),
    Parameter(
        "thinking",
        "prompt.chat.template_kwargs",
        _put_thinking,
        "as `enable_thinking`, for chat templates that know the word; `display: omitted` leaves thoughts out; "
        "`budget_tokens` bounds nothing",
        schema=OBJECT,
    ),
    Parameter(
        "cache_control",
        "",
        _put_cache_control,
        'refused but for `{"type": "ephemeral"}`: what prompts begin with is cached without being asked',
        taken=False,
        schema=OBJECT,
    ),
    refused("speed", "there is one speed", "standard"),
    refused("user_profile_id", "whom a call is for, its credentials say"),
    refused("workspace_id", "whom a call is for, its credentials say"),
    refused("context_management", "the conversation is read as it is", {}),
    refused("mcp_servers", "the server calls no others", []),
)

MESSAGES = Table(
    "/v1/messages",
    new_turn,
    (
        SPEC,
        MODEL,
        scalar("max_tokens", "stopping.max_tokens", "without it as many as the context has room for"),
        scalar("temperature", "sampling.temperature"),
        scalar("top_p", "sampling.top_p"),
        scalar("top_k", "sampling.top_k"),
        listing("stop_sequences", "stopping.stop"),
        Parameter("stream", "", put_stream, "server-sent events, the last one `message_stop`", schema=BOOLEAN),
        Parameter("metadata", "labels", _put_metadata, "`user_id`, as the label of that name", schema=OBJECT),
        Parameter(
            "output_config",
            "constraint",
            _put_output_config,
            "`format` is the form, `effort` as `reasoning_effort`",
            schema=OBJECT,
        ),
        *_CONVERSATION,
        refused("service_tier", "there is one tier", "auto", "standard_only"),
        refused("container", "the server runs no code"),
        refused("inference_geo", "requests are served where they arrive"),
        refused("diagnostics", "its answers have no place for them"),
        refused("thread", "nothing is kept: send the conversation, of tool_runner with thread=False"),
        refused("compaction", "the conversation is read as it is"),
        refused("fallbacks", "who answers, `model` says: a route may have several"),
        refused("fallback_credit_token", "nothing is billed"),
        refused("billing_policy", "nothing is billed"),
    ),
    lambda draft: check_single(draft, *UNTOLD),
    does="A message of the assistant, in Anthropic's words",
    needs=("model", "messages"),
    told=anthropic_error,
)

COUNT = Table(
    "/v1/messages/count_tokens",
    _new_count,
    (
        MODEL,
        Parameter(
            "output_config",
            "prompt.chat.template_kwargs",
            _put_effort,
            "`effort`; `format` takes none of the prompt",
            schema=OBJECT,
        ),
        *_CONVERSATION,
    ),
    does="How many tokens a message would read",
    needs=("model", "messages"),
    told=anthropic_error,
)
