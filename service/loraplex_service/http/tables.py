"""The parameters of each endpoint: what they become in the contract, or why they are refused.

docs/http.md is rendered from these tables.
"""

from typing import Any

from loraplex.v1.pooling_pb2 import EmbedRequest
from loraplex.v1.tokenizer_pb2 import DetokenizeRequest, TokenizeRequest
from loraplex_service.http import conversations as said
from loraplex_service.http.options import (
    CACHE_KEY,
    METADATA,
    MODEL,
    NOT_KEPT,
    SPEC,
    constrain,
    form_of,
    new_chat,
    new_spec,
    put_form,
    put_stream,
)
from loraplex_service.http.parameters import (
    ARRAY,
    BOOLEAN,
    INTEGER,
    OBJECT,
    STRING,
    STRING_OR_ARRAY,
    STRING_OR_OBJECT,
    Draft,
    Parameter,
    Put,
    Table,
    bounded,
    flag,
    label,
    listing,
    mapping,
    number,
    refuse_others,
    refused,
    scalar,
    whole,
    wrong,
)

COMPLETION_TOKENS = 16  # of /v1/completions by default, as OpenAI has it
STREAM_OPTIONS = "`include_usage`; beside it vLLM's `continuous_usage_stats`: each chunk says what its choice has used"


# ---- values that are no field as they are ----------------------------------------------------------------------------


def _check_options(draft: Draft) -> None:
    """Raise Refusal for what an answer in OpenAI's words could not tell."""
    if draft.has_stream_options and not draft.stream:
        raise wrong("stream_options", "goes with stream alone")
    output = draft.message.output
    if draft.continuous_usage and not draft.include_usage:
        raise wrong("stream_options.continuous_usage_stats", "goes with include_usage alone")
    if draft.continuous_usage and not (output.token_ids or (output.HasField("text") and not output.text)):
        draft.hides_token_ids = output.token_ids = True
    if draft.stream and output.HasField("prompt_logprobs"):
        problem = "does not go with stream, whose chunks have no place for it"
        raise wrong("prompt_logprobs", problem, code="unsupported_parameter")
    if output.logprob_token_ids:
        problem = "is not told over HTTP, whose answers have no place for it"
        raise wrong("loraplex.output.logprobTokenIds", problem, code="unsupported_parameter")


def _check_chat(draft: Draft) -> None:
    _check_options(draft)
    said.check_tools(draft)


def _put_stream_options(draft: Draft, value: Any) -> None:
    options = mapping(value)
    refuse_others(options, ("include_usage", "continuous_usage_stats", "include_obfuscation"), "stream_options")
    flag(options.get("include_obfuscation") or False)  # what it hides from who listens, TLS is for
    draft.has_stream_options = True
    draft.continuous_usage = flag(options.get("continuous_usage_stats") or False)
    draft.include_usage = flag(options.get("include_usage") or False)


def _put_logit_bias(draft: Draft, value: Any) -> None:
    for token, bias in bounded(mapping(value), "Sampling.logit_bias").items():
        draft.message.sampling.logit_bias[int(token)] = number(bias)


def _put_top_k(draft: Draft, value: Any) -> None:
    draft.message.sampling.top_k = 0 if value == -1 else whole(value)


def _put_priority(draft: Draft, value: Any) -> None:
    draft.message.priority = -whole(value)


def _put_include_reasoning(draft: Draft, value: Any) -> None:
    draft.include_reasoning = flag(value)


def _put_echo(draft: Draft, value: Any) -> None:
    draft.echo = flag(value)


def _put_encoding_format(draft: Draft, value: Any) -> None:
    if value not in ("float", "base64"):
        raise ValueError('must be "float" or "base64"')
    draft.base64 = value == "base64"


def _put_return_token_ids(draft: Draft, value: Any) -> None:
    draft.message.output.token_ids = draft.message.output.prompt_token_ids = flag(value)
    draft.message.output.text = True


def _put_tokens_as_ids(draft: Draft, value: Any) -> None:
    draft.spells_token_ids = flag(value)


def _put_completion_logprobs(draft: Draft, value: Any) -> None:
    draft.message.output.logprobs = True
    draft.message.output.top_logprobs = whole(value)


def _put_older_max_tokens(draft: Draft, value: Any) -> None:
    stopping = draft.message.stopping
    if any(name == "max_completion_tokens" for _, name in draft.paths) and stopping.max_tokens != whole(value):
        raise ValueError("max_completion_tokens has another value; set one of them")
    stopping.max_tokens = whole(value)


# ---- forms -----------------------------------------------------------------------------------------------------------


def _put_form(kind: str) -> Put:
    return lambda draft, value: constrain(draft, form_of(kind, value))


def _put_structured_outputs(draft: Draft, value: Any) -> None:
    if all(content in (None, False) for content in mapping(value).values()):
        raise ValueError("asks for no form; leave it out")
    for kind, content in value.items():
        if kind not in ("json", "json_object", "regex", "choice", "grammar"):
            problem = "json, json_object, regex, choice and grammar are taken"
            raise wrong(f"structured_outputs.{kind}", problem, code="unsupported_parameter")
        if content not in (None, False):
            constrain(draft, form_of(kind, content))


def _put_response_format(draft: Draft, value: Any) -> None:
    put_form(draft, value, "response_format", "json_schema")


# ---- the tables ------------------------------------------------------------------------------------------------------

_ADD_SPECIAL = scalar("add_special_tokens", "prompt.add_special_tokens")

_GENERATION = (
    SPEC,
    MODEL,
    scalar("temperature", "sampling.temperature"),
    scalar("top_p", "sampling.top_p"),
    scalar("n", "sampling.n"),
    scalar("seed", "sampling.seed"),
    scalar("frequency_penalty", "sampling.frequency_penalty"),
    scalar("presence_penalty", "sampling.presence_penalty"),
    Parameter("logit_bias", "sampling.logit_bias", _put_logit_bias, schema=OBJECT),
    listing("stop", "stopping.stop"),
    Parameter("stream", "", put_stream, "server-sent events, the last one `[DONE]`", schema=BOOLEAN),
    Parameter("stream_options", "", _put_stream_options, STREAM_OPTIONS, schema=OBJECT),
    Parameter(
        "response_format",
        "constraint",
        _put_response_format,
        "`text` is any text, whatever is the default",
        schema=OBJECT,
    ),
    label("user"),
    label("safety_identifier"),
    METADATA,
    CACHE_KEY,
    Parameter("top_k", "sampling.top_k", _put_top_k, "-1 is off, too", schema=INTEGER),
    scalar("min_p", "sampling.min_p"),
    scalar("typical_p", "sampling.typical_p"),
    scalar("repetition_penalty", "sampling.repetition_penalty"),
    listing("allowed_token_ids", "sampling.allowed_token_ids"),
    listing("bad_words", "sampling.bad_words"),
    listing("stop_token_ids", "stopping.stop_token_ids"),
    scalar("min_tokens", "stopping.min_tokens"),
    scalar("ignore_eos", "stopping.ignore_eos"),
    scalar("include_stop_str_in_output", "stopping.include_stop"),
    scalar("skip_special_tokens", "output.skip_special_tokens"),
    scalar("prompt_logprobs", "output.prompt_logprobs"),
    Parameter(
        "return_token_ids",
        "output.token_ids",
        _put_return_token_ids,
        "`token_ids` of each choice, and `prompt_token_ids`",
        schema=BOOLEAN,
    ),
    Parameter(
        "return_tokens_as_token_ids",
        "",
        _put_tokens_as_ids,
        "among log-probabilities tokens are called `token_id:7`, as vLLM has it",
        schema=BOOLEAN,
    ),
    scalar("truncate_prompt_tokens", "prompt.truncate_to_tokens"),
    _ADD_SPECIAL,
    scalar("cache_salt", "cache.salt"),
    Parameter(
        "priority", "priority", _put_priority, "lower goes first, as vLLM has it: with the other sign", schema=INTEGER
    ),
    scalar("request_id", "client_request_id"),
    Parameter("guided_json", "constraint.json_schema", _put_form("json"), schema=STRING_OR_OBJECT),
    Parameter("guided_regex", "constraint.regex", _put_form("regex"), schema=STRING),
    Parameter("guided_choice", "constraint.choices", _put_form("choice"), schema=ARRAY),
    Parameter("guided_grammar", "constraint.grammar", _put_form("grammar"), schema=STRING),
    Parameter(
        "structured_outputs",
        "constraint",
        _put_structured_outputs,
        "json, json_object, regex, choice, grammar",
        schema=OBJECT,
    ),
    refused("store", "nothing is kept", False),
    refused("service_tier", "there is one tier", "auto", "default"),
    refused("use_beam_search", 'searches are asked for by {"loraplex": {"beam_search": …}}', False),
    refused("length_penalty", "it belongs to beam searches", 1.0),
    refused("spaces_between_special_tokens", "tokens are joined as the tokenizer joins them", True),
    refused("guided_decoding_backend", "there is one", "auto"),
    refused("logits_processors", "no code of callers is run"),
    refused("kv_transfer_params", "caches are not moved between servers"),
    refused("vllm_xargs", "there is nothing that takes them"),
)


def _finish_completion(draft: Draft) -> None:
    _check_options(draft)
    if draft.echo and draft.message.prompt.HasField("truncate_to_tokens"):
        raise wrong("echo", "does not go with truncate_prompt_tokens: what would come back was not all read")
    if not draft.message.stopping.HasField("max_tokens"):
        draft.message.stopping.max_tokens = max(COMPLETION_TOKENS, draft.message.stopping.min_tokens)


_CONVERSATION = (
    Parameter(
        "messages", "prompt.chat.messages", said.put_messages, "their content is text, whole or in parts", schema=ARRAY
    ),
    Parameter(
        "tools", "prompt.chat.tools", said.put_tools, "`strict` counts where `tool_choice` requires calls", schema=ARRAY
    ),
    scalar("add_generation_prompt", "prompt.chat.add_generation_prompt"),
    scalar("continue_final_message", "prompt.chat.continue_final_message"),
    Parameter("chat_template_kwargs", "prompt.chat.template_kwargs", said.put_template_kwargs, schema=OBJECT),
    refused("chat_template", "templates belong to models and adapters"),
    refused("chat_template_content_format", "contents reach templates as text", "auto", "string"),
    refused("mm_processor_kwargs", "there is text alone"),
)

CHAT = Table(
    "/v1/chat/completions",
    new_chat,
    (
        *_GENERATION,
        *_CONVERSATION,
        scalar("max_completion_tokens", "stopping.max_tokens"),
        Parameter("max_tokens", "stopping.max_tokens", _put_older_max_tokens, "the older name", schema=INTEGER),
        scalar("logprobs", "output.logprobs"),
        scalar("top_logprobs", "output.top_logprobs"),
        Parameter("tool_choice", "prompt.chat.tool_choice", said.put_tool_choice, schema=STRING_OR_OBJECT),
        scalar("parallel_tool_calls", "prompt.chat.parallel_tool_calls"),
        Parameter(
            "reasoning_effort",
            "prompt.chat.template_kwargs",
            said.put_reasoning_effort,
            "for chat templates that know the word",
            schema=STRING,
        ),
        Parameter("documents", "prompt.chat.template_kwargs", said.put_documents, schema=ARRAY),
        Parameter(
            "include_reasoning", "", _put_include_reasoning, "false leaves `reasoning_content` out", schema=BOOLEAN
        ),
        refused("echo", "continue_final_message goes on with what was said", False),
        refused("best_of", "it belongs to /v1/completions"),
        refused("functions", "they are `tools` now"),
        refused("function_call", "it is `tool_choice` now"),
        refused("modalities", "there is text alone", ["text"]),
        refused("audio", "there is text alone"),
        refused("prediction", 'drafts are asked for by {"loraplex": {"drafts": …}}'),
        refused("verbosity", "say it in the conversation", "medium"),
        refused("web_search_options", "nothing is searched"),
        *NOT_KEPT,
    ),
    _check_chat,
    does="A message of the assistant, after a conversation",
    needs=("model", "messages"),
)

COMPLETIONS = Table(
    "/v1/completions",
    new_spec,
    (
        *_GENERATION,
        Parameter(
            "prompt", "prompt", said.put_prompts, "a text, token ids, or a list of either", schema=STRING_OR_ARRAY
        ),
        scalar("max_tokens", "stopping.max_tokens", f"{COMPLETION_TOKENS} by default, as OpenAI has it"),
        Parameter(
            "logprobs", "output.top_logprobs", _put_completion_logprobs, "0: those of the tokens alone", schema=INTEGER
        ),
        scalar("best_of", "sampling.best_of"),
        Parameter("echo", "", _put_echo, "the prompt comes back in front of each output", schema=BOOLEAN),
        refused("suffix", "nothing is filled in before a text"),
        refused("prompt_embeds", "prompts are texts or tokens"),
    ),
    _finish_completion,
    does="Texts that prompts go on with",
    needs=("model", "prompt"),
)

EMBEDDINGS = Table(
    "/v1/embeddings",
    lambda: Draft(EmbedRequest(), paths=[("prompts", "input")]),
    (
        MODEL,
        Parameter(
            "input",
            "prompts",
            said.put_inputs,
            "a text, token ids, or a list of either: at most 256",
            schema=STRING_OR_ARRAY,
        ),
        scalar("dimensions", "dimensions"),
        Parameter("encoding_format", "", _put_encoding_format, "`float` or `base64`", schema=STRING),
        label("user", "options.labels"),
        scalar("normalize", "normalize"),
        Parameter("truncate_prompt_tokens", "prompts", said.put_in_each("truncate_to_tokens"), schema=INTEGER),
        Parameter("add_special_tokens", "prompts", said.put_in_each("add_special_tokens"), schema=BOOLEAN),
        scalar("cache_salt", "options.cache.salt"),
        scalar("request_id", "options.client_request_id"),
    ),
    does="Texts as vectors",
    needs=("model", "input"),
)

TOKENIZE = Table(
    "/tokenize",
    lambda: Draft(TokenizeRequest()),
    (
        MODEL,
        Parameter("prompt", "prompt.text", said.put_text, "a text; or `messages`", schema=STRING),
        *_CONVERSATION,
        _ADD_SPECIAL,
        refused("return_token_strs", "/detokenize has the texts of tokens", False),
    ),
    does="A prompt as tokens",
    needs=("model",),
)

DETOKENIZE = Table(
    "/detokenize",
    lambda: Draft(DetokenizeRequest()),
    (MODEL, listing("tokens", "token_ids"), scalar("skip_special_tokens", "skip_special_tokens")),
    does="Tokens as text",
    needs=("model",),
)

TABLES = (CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE, DETOKENIZE)
