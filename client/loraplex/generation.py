"""GenerateSpec from keyword arguments."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from google.protobuf.duration_pb2 import Duration

from loraplex.prompts import PromptLike, Tool, build_prompt, build_tool
from loraplex.v1 import generation_pb2


class GenerateOptions(TypedDict, total=False):
    """Everything that a generation can be told, by the names of the contract; see loraplex/v1/generation.proto.

    None is the same as leaving it out: the server's default. Zero is zero.
    """

    # The prompt
    add_special_tokens: bool | None
    truncate_to_tokens: int | None
    literal_content: bool | None
    tools: Sequence[Tool] | None
    template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    # How tokens are chosen
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    n: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    # When an output ends
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    fit_max_tokens: bool | None
    time_limit: float | datetime.timedelta | None  # seconds
    # What comes back
    text: bool | None
    token_ids: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    # What form the text must have: at most one
    json_schema: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    # The prefix cache
    bypass_prefix_cache: bool | None
    salt: str | None
    # An adapter that is not on the device
    on_cold: generation_pb2.OnCold.ValueType | str | None  # or "wait", "fail", "use_base"
    max_load_wait: float | datetime.timedelta | None  # seconds
    # How a stream is cut into messages
    min_tokens_per_chunk: int | None
    max_chunk_delay: float | datetime.timedelta | None  # seconds
    # The request
    priority: int | None
    client_request_id: str | None
    labels: Mapping[str, str] | None


_PARTS = ("sampling", "stopping", "output", "cache", "adapter_policy", "stream")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "choices", "grammar")
_PROMPT = ("add_special_tokens", "truncate_to_tokens", "literal_content")
_CHAT = ("tools", "template_kwargs", "add_generation_prompt", "continue_final_message")
_REQUEST = ("priority", "client_request_id", "labels")


def generate_spec(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    **options: Unpack[GenerateOptions],
) -> generation_pb2.GenerateSpec:
    """What to generate: a copy of `spec`, if given, with everything else that is given put in its place.

    Raises TypeError or ValueError for options that do not exist or do not fit their field, and ValueError for a spec
    without a model or a prompt. Ranges are the server's to check.
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
    given = {name: value for name, value in options.items() if value is not None}
    for name in _PARTS:
        part = getattr(built, name)
        _put(part, {field: given.pop(field) for field in part.DESCRIPTOR.fields_by_name if field in given})
    _put(built.prompt, {name: given.pop(name) for name in _PROMPT if name in given})
    _put_chat(built, {name: given.pop(name) for name in _CHAT if name in given})
    _put_constraint(built, {name: given.pop(name) for name in _CONSTRAINTS if name in given})
    _put(built, {name: given.pop(name) for name in _REQUEST if name in given})
    if given:
        raise TypeError(f"a generation has no option {', '.join(sorted(given))}")
    return built


def duration(value: float | datetime.timedelta) -> Duration:
    """A Duration from seconds or a timedelta."""
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else value
    built = Duration()
    built.FromNanoseconds(round(seconds * 1e9))
    return built


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
    if field.enum_type is generation_pb2.OnCold.DESCRIPTOR and isinstance(value, str):
        return generation_pb2.OnCold.Value(f"ON_COLD_{value.upper()}")
    if field.name == "stop" and isinstance(value, str):
        return [value]
    return value


def _put_chat(spec: generation_pb2.GenerateSpec, values: dict[str, Any]) -> None:
    if not values:
        return
    if spec.prompt.WhichOneof("content") != "chat":
        raise ValueError(f"{', '.join(values)} only go with chat messages, and the prompt is not chat")
    if "tools" in values:
        values["tools"] = [build_tool(tool) for tool in values["tools"]]
    if (kwargs := values.pop("template_kwargs", None)) is not None:
        spec.prompt.chat.template_kwargs.Clear()
        spec.prompt.chat.template_kwargs.update(kwargs)
    _put(spec.prompt.chat, values)


def _put_constraint(spec: generation_pb2.GenerateSpec, values: dict[str, Any]) -> None:
    if values.get("json_object") is False:
        del values["json_object"]
    if not values:
        return
    if len(values) > 1:
        raise ValueError(f"an output has one constraint at most, and these are given: {', '.join(values)}")
    [(name, value)] = values.items()
    if name == "json_schema" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    if name == "json_object":
        value = generation_pb2.JsonObject()
    if name == "choices":
        value = generation_pb2.Choices(values=value)
    _put(spec.constraint, {name: value})
