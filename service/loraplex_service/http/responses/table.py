"""The parameters of OpenAI's Responses: what they become in the contract, or why they are refused."""

from typing import Any

from loraplex_service.http import conversations as said
from loraplex_service.http.options import (
    CACHE_KEY,
    METADATA,
    MODEL,
    NOT_KEPT,
    SPEC,
    check_single,
    new_turn,
    put_form,
    put_stream,
)
from loraplex_service.http.parameters import (
    ARRAY,
    BOOLEAN,
    OBJECT,
    STRING,
    STRING_OR_ARRAY,
    STRING_OR_OBJECT,
    Draft,
    Parameter,
    Table,
    flag,
    items,
    label,
    mapping,
    refuse_others,
    refused,
    scalar,
    wrong,
)
from loraplex_service.http.responses.answers import REPEATED
from loraplex_service.http.responses.input import put_input, put_instructions, put_tool_choice, put_tools

INCLUDED = ("message.output_text.logprobs", "reasoning.encrypted_content")
SUMMARIES = ("auto", "concise", "detailed")  # as OpenAI has it, a model without them gives none
EFFORTLESS = {"summary": SUMMARIES, "generate_summary": SUMMARIES, "mode": ("standard",), "context": ("auto",)}
UNTOLD = ("prompt_logprobs", "token_ids", "prompt_token_ids", "logprob_token_ids")  # of OutputOptions


def _put_text(draft: Draft, value: Any) -> None:
    refuse_others(mapping(value), ("format", "verbosity"), "text")
    if value.get("verbosity") not in (None, "medium"):
        raise wrong("text.verbosity", "say it in the conversation", code="unsupported_parameter")
    if value.get("format") is not None:
        put_form(draft, value["format"], "text.format")


def _put_reasoning(draft: Draft, value: Any) -> None:
    asked = {key: content for key, content in mapping(value).items() if content not in EFFORTLESS.get(key, ())}
    refuse_others(asked, ("effort",), "reasoning")
    if asked.get("effort") is not None:
        said.put_reasoning_effort(draft, asked["effort"])


def _put_include(draft: Draft, value: Any) -> None:
    for index, wanted in enumerate(items(value)):
        if wanted not in INCLUDED:
            raise wrong(f"include[{index}]", f"{' and '.join(INCLUDED)} are taken", code="unsupported_parameter")
        if wanted == INCLUDED[0]:
            draft.message.output.logprobs = True


def _put_stream_options(draft: Draft, value: Any) -> None:
    refuse_others(mapping(value), ("include_obfuscation",), "stream_options")
    flag(value.get("include_obfuscation") or False)  # what it hides from who listens, TLS is for
    draft.has_stream_options = True


def _check(draft: Draft) -> None:
    if draft.has_stream_options and not draft.stream:
        raise wrong("stream_options", "goes with stream alone")
    check_single(draft, *UNTOLD)


RESPONSES = Table(
    "/v1/responses",
    lambda: new_turn("input"),
    (
        SPEC,
        MODEL,
        Parameter(
            "instructions", "prompt.chat.messages", put_instructions, "what the system says first", schema=STRING
        ),
        Parameter(
            "input",
            "prompt.chat.messages",
            put_input,
            "a text, or items: messages, `reasoning`, `function_call`, `function_call_output`",
            schema=STRING_OR_ARRAY,
        ),
        Parameter(
            "tools", "prompt.chat.tools", put_tools, "`strict` counts where `tool_choice` requires calls", schema=ARRAY
        ),
        Parameter("tool_choice", "prompt.chat.tool_choice", put_tool_choice, schema=STRING_OR_OBJECT),
        scalar("parallel_tool_calls", "prompt.chat.parallel_tool_calls"),
        scalar("max_output_tokens", "stopping.max_tokens"),
        scalar("temperature", "sampling.temperature"),
        scalar("top_p", "sampling.top_p"),
        scalar("ignore_eos", "stopping.ignore_eos"),
        scalar("top_logprobs", "output.top_logprobs"),
        Parameter("text", "constraint", _put_text, "`format`", schema=OBJECT),
        Parameter(
            "reasoning",
            "prompt.chat.template_kwargs",
            _put_reasoning,
            "`effort`, as `reasoning_effort`, for chat templates that know the word",
            schema=OBJECT,
        ),
        Parameter(
            "include",
            "output.logprobs",
            _put_include,
            "`message.output_text.logprobs`; `reasoning.encrypted_content`, which is null: `content` can be read",
            schema=ARRAY,
        ),
        Parameter("stream", "", put_stream, "server-sent events, the last one `response.completed`", schema=BOOLEAN),
        Parameter(
            "stream_options",
            "",
            _put_stream_options,
            "`include_obfuscation` adds nothing",
            schema=OBJECT,
        ),
        METADATA,
        label("user"),
        label("safety_identifier"),
        CACHE_KEY,
        *NOT_KEPT,
        refused("store", "nothing is kept", False),
        refused("previous_response_id", "nothing is kept: send its items again in `input`"),
        refused("conversation", "nothing is kept: send its items in `input`"),
        refused("prompt", "there are no stored prompts: send `instructions`"),
        refused("background", "the answer is to who asks, while they wait", False),
        refused("background_options", "the answer is to who asks, while they wait"),
        refused("context_management", "the conversation is read as it is"),
        refused("truncation", "the conversation is read as it is", "disabled"),
        refused("max_tool_calls", "the server runs no tools itself"),
        refused("service_tier", "there is one tier", "auto", "default"),
        refused("image", "there is text alone"),
        refused("access_programs", "who may do what, the credentials say"),
    ),
    _check,
    does="A response, without state",
    needs=("model", "input"),
    repeated=REPEATED,
)
