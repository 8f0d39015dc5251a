"""Options of a generation, and the GenerateSpec that they make. client/generate.py spells them out in signatures."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from google.protobuf.duration_pb2 import Duration

from loraplex.prompts import PromptLike, Tool, build_prompt, build_tool, build_tool_choice
from loraplex.v1 import generation_pb2, pooling_pb2, prompt_pb2
from loraplex.watermark import Watermark


class PromptOptions(TypedDict, total=False):
    """Options of how a prompt becomes tokens. None is the same as leaving an option out."""

    add_special_tokens: bool | None
    """Whether the tokenizer adds its special tokens. None: yes for text, no for chat."""
    truncate_to_tokens: int | None
    """How many tokens to keep of a longer prompt: the last ones. None: a prompt that is too long is refused."""
    literal_content: bool | None
    """Whether text that spells a control token stays text. None: no for text; as the model is configured for chat."""
    tools: Sequence[Tool] | None
    """Tools that the model may call, in a chat. None: no tools."""
    tool_choice: str | prompt_pb2.ToolChoice | None
    """Whether the model calls tools: "auto", "none", "required", or the name of the tool to call. None: auto."""
    parallel_tool_calls: bool | None
    """Whether one message may call several tools. None: yes."""
    template_kwargs: Mapping[str, object] | None
    """Further variables of the chat template. None: no variables."""
    add_generation_prompt: bool | None
    """Whether a chat ends with the opening of an assistant message. None: yes, unless continue_final_message."""
    continue_final_message: bool | None
    """Whether the model continues the last message of a chat. None: no."""


class RunOptions(TypedDict, total=False):
    """Options of how a request is run. None is the same as leaving an option out."""

    # The prefix cache
    bypass_prefix_cache: bool | None
    """Whether to compute the whole prompt anew and leave nothing in the cache. None: no."""
    salt: str | None
    """Text without which no other request shares cached prefixes with this one. None: no salt."""
    # An adapter that is not on the device
    on_cold: generation_pb2.OnCold.ValueType | str | None
    """What to do when the adapter is not on the device: "wait", "fail" or "use_base". None: wait."""
    max_load_wait: float | datetime.timedelta | None
    """Seconds to wait for an adapter at most. None: the server's limit."""
    # The request
    priority: int | None
    """Rank under load: higher goes before lower. None: 0."""
    client_request_id: str | None
    """Your name for this request, which comes back in the answer and in the server's logs. None: no name."""
    labels: Mapping[str, str] | None
    """Labels for your accounting, which come back in the answer. None: no labels."""


class SharedOptions(PromptOptions, RunOptions, total=False):
    """Options of whatever reads a prompt and tells of tokens. None is the same as leaving an option out."""

    # Log-probabilities
    logprobs: bool | None
    """Whether to return the log-probability of each token. None: no."""
    top_logprobs: int | None
    """Number of the likeliest tokens to return beside each token. None: 0."""
    logprob_token_ids: Sequence[int] | None
    """Token ids whose log-probabilities to return beside each token. None: no ids."""


class GenerateOptions(SharedOptions, total=False):
    """Options of a generation, by the names of the contract; see loraplex/v1/generation.proto.

    None is the same as leaving an option out. Zero is zero.
    """

    # How tokens are chosen
    temperature: float | None
    """Divisor of the logits. 0 takes the likeliest token each time. None: 1."""
    top_p: float | None
    """Total probability of the likeliest tokens to keep. None: 1, which keeps all."""
    top_k: int | None
    """Number of the likeliest tokens to keep. 0 keeps all. None: 0."""
    min_p: float | None
    """Smallest probability to keep, as a fraction of the likeliest token's. None: 0, which keeps all."""
    typical_p: float | None
    """Total probability of the most typical tokens to keep. None: 1, which keeps all."""
    repetition_penalty: float | None
    """Factor against tokens of the prompt and the output. None: 1, which changes nothing."""
    presence_penalty: float | None
    """Amount to take from the logit of each token that the output has. None: 0."""
    frequency_penalty: float | None
    """Amount to take from a token's logit for each time that the output has the token. None: 0."""
    seed: int | None
    """Number that makes the draws repeatable. None: the server chooses one and reports it."""
    n: int | None
    """Number of outputs to generate from the prompt. None: 1."""
    best_of: int | None
    """Number of outputs to draw, of which the n best come back. None: n."""
    logit_bias: Mapping[int, float] | None
    """Amounts to add to the logits, by token id. None: no amounts."""
    allowed_token_ids: Sequence[int] | None
    """Token ids that may be chosen. None: all."""
    bad_words: Sequence[str] | None
    """Words that are never written. None: no words."""
    # A mark of the outputs
    watermark: Watermark | None
    """Watermark, with which its `detect` finds the outputs again. None: no watermark."""
    # A search for the likeliest outputs, instead of draws
    num_beams: int | None
    """Number of beginnings that go on in a search. None: no search."""
    length_penalty: float | None
    """Power of the length by which an output's score is divided: above 0 favours long ones. None: 1."""
    early_stopping: generation_pb2.EarlyStopping.ValueType | str | None
    """When a search with enough ended outputs ends: "heuristic", "always" or "never". None: heuristic."""
    # When an output ends
    max_tokens: int | None
    """Most tokens of an output; 0: none, the prompt is read. None: as many as the context has room for."""
    min_tokens: int | None
    """Number of tokens before which nothing ends an output. None: 0."""
    stop: str | Sequence[str] | None
    """String or strings that end an output. None: no strings."""
    stop_token_ids: Sequence[int] | None
    """Token ids that end an output. None: only the model's end of sequence."""
    include_stop: bool | None
    """Whether the stop string or stop token is part of the output. None: no."""
    ignore_eos: bool | None
    """Whether to go on past the model's end of sequence. None: no."""
    fit_max_tokens: bool | None
    """Whether to cut max_tokens to the room that the prompt leaves. None: no, and such a request is refused."""
    time_limit: float | datetime.timedelta | None
    """Seconds after which the outputs end as they are, without an error. None: no limit."""
    # What comes back
    text: bool | None
    """Whether to return text. None: yes."""
    token_ids: bool | None
    """Whether to return token ids. None: no, unless text is False."""
    prompt_token_ids: bool | None
    """Whether to return the ids of the prompt's tokens. None: no."""
    prompt_logprobs: int | None
    """Number of the likeliest tokens to return beside each token of the prompt. None: nothing of the prompt."""
    logprobs_mode: generation_pb2.LogprobsMode.ValueType | str | None
    """Distribution of the log-probabilities: "raw", the model's, or "processed", the one drawn from. None: raw."""
    skip_special_tokens: bool | None
    """Whether to leave special tokens out of the text. None: yes."""
    parse_message: bool | None
    """Whether reasoning and calls of tools come apart from a chat's text. None: yes, where the server knows how."""
    # What form the text must have: at most one
    json_schema: str | Mapping[str, object] | None
    """JSON Schema that the text must satisfy, as JSON text or as a mapping. None: any text."""
    json_object: bool | None
    """Whether the text must be a JSON object. None: no."""
    regex: str | None
    """Regular expression that the whole text must match. None: any text."""
    choices: Sequence[str] | None
    """Texts, one of which the output must be. None: any text."""
    grammar: str | None
    """Grammar that the text must follow, in GBNF. None: any text."""
    any_text: bool | None
    """Whether the text may be any, whatever the route or the adapter says. None: no, their default holds."""
    # Guesses at the next tokens
    draft_kind: generation_pb2.DraftKind.ValueType | str | None
    """Where drafts come from: "off", "ngram" or "model". They change the speed alone. None: as the model says."""
    max_draft_tokens: int | None
    """Most drafts at once. None: as many as the model is configured for."""
    # How a stream is cut into messages
    min_tokens_per_chunk: int | None
    """Number of tokens to gather into one message of a stream. None: 1."""
    max_chunk_delay: float | datetime.timedelta | None
    """Seconds to hold tokens back at most. None: 0.1."""


_PARTS = ("sampling", "beam_search", "stopping", "output", "cache", "adapter_policy", "drafts", "stream")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "choices", "grammar", "any_text")
_PROMPT = ("add_special_tokens", "truncate_to_tokens", "literal_content")
_CHAT = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
_ENUMS: dict[Any, tuple[str, Any]] = {
    generation_pb2.EarlyStopping.DESCRIPTOR: ("EARLY_STOPPING", generation_pb2.EarlyStopping),
    generation_pb2.OnCold.DESCRIPTOR: ("ON_COLD", generation_pb2.OnCold),
    generation_pb2.LogprobsMode.DESCRIPTOR: ("LOGPROBS_MODE", generation_pb2.LogprobsMode),
    generation_pb2.DraftKind.DESCRIPTOR: ("DRAFT_KIND", generation_pb2.DraftKind),
}
_RUN_PARTS = ("cache", "adapter_policy")
_REQUEST = ("priority", "client_request_id", "labels")


def build_spec(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    **options: Unpack[GenerateOptions],
) -> generation_pb2.GenerateSpec:
    """Build a GenerateSpec. What is given replaces what `spec` says.

    An option that is None is as in `spec`. Where `spec` leaves it out too, the route's default holds, else the model's,
    else what is stated here.

    Raises TypeError or ValueError for a value that does not fit its field, and ValueError for a spec without a model or
    a prompt. The server checks ranges.

    Args:
        model: Name of a model, an adapter, an adapter version or a route. None: that of `spec`.
        prompt: Text, token ids or chat messages. None: that of `spec`.
        spec: Spec to begin with. None: an empty one.
    """
    built = generation_pb2.GenerateSpec()
    if spec is not None:
        built.CopyFrom(spec)
    if model is not None:
        built.model = model
    if prompt is not None:
        built.prompt.CopyFrom(build_prompt(prompt))
    if not built.model:
        raise ValueError("no model: pass model=, or a spec that has one")
    if not built.prompt.HasField("content"):
        raise ValueError("no prompt: pass prompt=, or a spec that has one")
    given = given_options(options)
    _put_parts(built, _PARTS, given)
    put_prompt_options(built.prompt, given)
    form = constraint(**{name: given[name] for name in _CONSTRAINTS if name in given})
    if form.WhichOneof("kind"):
        built.constraint.CopyFrom(form)
    _put(built, {name: given[name] for name in _REQUEST if name in given})
    if "watermark" in given:
        built.watermark.CopyFrom(given["watermark"].message())
    return built


def build_run_options(options: Mapping[str, Any]) -> pooling_pb2.RunOptions:
    """Build the message of what these options say about how a request is run. Others are passed over."""
    built, given = pooling_pb2.RunOptions(), given_options(options)
    _put_parts(built, _RUN_PARTS, given)
    _put(built, {name: given[name] for name in _REQUEST if name in given})
    return built


def duration(value: float | datetime.timedelta) -> Duration:
    """Convert seconds or a timedelta to a Duration."""
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else value
    built = Duration()
    built.FromNanoseconds(round(seconds * 1e9))
    return built


def _put_parts(message: Any, names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Set the fields of these parts of a message that are given."""
    for name in names:
        part = getattr(message, name)
        _put(part, {field: given[field] for field in part.DESCRIPTOR.fields_by_name if field in given})


def _put(message: Any, values: Mapping[str, Any]) -> None:
    """Set these fields of a protobuf message, each as a whole."""
    for name, value in values.items():
        try:
            only = type(message)(**{name: _convert(message.DESCRIPTOR.fields_by_name[name], value)})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}={value!r} does not fit its field: {error}") from None
        message.ClearField(name)
        message.MergeFrom(only)


def _convert(field: Any, value: Any) -> Any:
    if field.message_type is Duration.DESCRIPTOR:
        return duration(value)
    if field.enum_type in _ENUMS and isinstance(value, str):
        prefix, enum = _ENUMS[field.enum_type]
        return enum.Value(f"{prefix}_{value.upper()}")
    if field.name == "stop" and isinstance(value, str):
        return [value]
    return value


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out options that are None."""
    return {name: value for name, value in options.items() if value is not None}


def put_prompt_options(prompt: prompt_pb2.Prompt, given: Mapping[str, Any]) -> None:
    """Set what these options say of the prompt. Options that are not PromptOptions are passed over."""
    _put(prompt, {name: given[name] for name in _PROMPT if name in given})
    _put_chat(prompt, {name: given[name] for name in _CHAT if name in given})


def _put_chat(prompt: prompt_pb2.Prompt, values: dict[str, Any]) -> None:
    if not values:
        return
    if prompt.WhichOneof("content") != "chat":
        raise ValueError(f"{', '.join(values)} only go with chat messages, and the prompt is not chat")
    if "tools" in values:
        values["tools"] = [build_tool(tool) for tool in values["tools"]]
    if "tool_choice" in values:
        values["tool_choice"] = build_tool_choice(values["tool_choice"])
    if (kwargs := values.pop("template_kwargs", None)) is not None:
        prompt.chat.template_kwargs.Clear()
        prompt.chat.template_kwargs.update(kwargs)
    _put(prompt.chat, values)


def constraint(
    *,
    json_schema: str | Mapping[str, object] | None = None,
    json_object: bool | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
    any_text: bool | None = None,
) -> generation_pb2.Constraint:
    """Build a constraint, such as the default of a route or an adapter. Without arguments: none.

    Raises ValueError if there are several, and TypeError or ValueError for a value that does not fit.

    Args:
        json_schema: JSON Schema that the text must satisfy, as JSON text or as a mapping.
        json_object: Whether the text must be a JSON object.
        regex: Regular expression that the whole text must match.
        choices: Texts, one of which the output must be.
        grammar: Grammar that the text must follow, in GBNF.
        any_text: Whether the text may be any, whatever else there is by default.
    """
    values: dict[str, Any] = {
        "json_schema": json_schema if json_schema is None or isinstance(json_schema, str) else _json(json_schema),
        "json_object": generation_pb2.JsonObject() if json_object else None,
        "regex": regex,
        "choices": None if choices is None else generation_pb2.Choices(values=choices),
        "grammar": grammar,
        "any_text": generation_pb2.AnyText() if any_text else None,
    }
    given = given_options(values)
    if len(given) > 1:
        raise ValueError(f"an output has one constraint at most, and these are given: {', '.join(given)}")
    built = generation_pb2.Constraint()
    _put(built, given)
    return built


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False)
