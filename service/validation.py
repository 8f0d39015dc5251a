"""What a GenerateSpec may say: one table of limits, and the way from a valid spec to SamplingParams.

Nothing here knows a model but `sampling_params`, which merges its defaults and checks ids against its vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from engine.messages import ModelLimits
from engine.sampling_params import SamplingParams
from loraplex.v1.generation_pb2 import GenerateSpec, OnCold, Sampling
from loraplex.v1.prompt_pb2 import Prompt
from service.errors import FeatureUnsupported, InvalidRequest, PromptTooLong, Violation

# What the contract has and this server does not. Refused by name; ServerInfo lists them.
UNSUPPORTED_FIELDS = ("GenerateSpec.constraint", "Sampling.bad_words", "Chat.tools")

# A rule yields (suffix of the path, problem) for everything that is wrong with one field's value.
Rule = Callable[[Any], Iterator[tuple[str, str]]]


def between(low: float, high: float, *, above: bool = False) -> Rule:
    """A number from `low` (or above it) to `high`. NaN is in no range."""

    def check(value: float) -> Iterator[tuple[str, str]]:
        if not low <= value <= high or (above and value == low):
            least = f"above {low:g}" if above else f"at least {low:g}"
            yield "", f"must be {least}" + (f" and at most {high:g}" if high < math.inf else "") + f", is {value}"

    return check


def at_most(count: int, item: Rule | None = None) -> Rule:
    """At most `count` items (of a map: entries), each of which obeys the rule."""

    def check(values: Any) -> Iterator[tuple[str, str]]:
        if len(values) > count:
            yield "", f"has {len(values)} entries; at most {count} are allowed"
        elif item is not None:
            entries = values.items() if isinstance(values, Mapping) else enumerate(values)
            for key, value in entries:
                for suffix, problem in item(value):
                    yield f"[{key}]{suffix}", problem

    return check


def length(low: int, high: int, unit: str = "characters") -> Rule:
    """A text of `low` to `high` characters or UTF-8 bytes."""

    def check(value: str) -> Iterator[tuple[str, str]]:
        size = len(value.encode()) if unit == "bytes" else len(value)
        if not low <= size <= high:
            yield "", f"has {size} {unit}; {low} to {high} are allowed"

    return check


def seconds(low: float, high: float, *, above: bool = False) -> Rule:
    """A duration in this range of seconds."""
    in_range = between(low, high, above=above)

    def check(value: Duration) -> Iterator[tuple[str, str]]:
        return in_range(duration_seconds(value))

    return check


def labels(value: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from at_most(16, length(0, 256))(value)
    yield from (("", f"the key {key[:63]!r}... has more than 63 characters") for key in value if len(key) > 63)


def on_cold(value: int) -> Iterator[tuple[str, str]]:
    if value not in OnCold.values():
        yield "", f"{value} is no OnCold that this server knows"


RULES: Mapping[str, Rule] = {
    "GenerateSpec.model": length(1, 512),
    "GenerateSpec.priority": between(-100, 100),
    "GenerateSpec.client_request_id": length(0, 128),
    "GenerateSpec.labels": labels,
    "Prompt.text": length(1, 1 << 22),
    "Prompt.truncate_to_tokens": between(1, math.inf),
    "Chat.messages": at_most(1024),
    "ChatMessage.role": length(1, 64),
    "Sampling.temperature": between(0, 10),
    "Sampling.top_p": between(0, 1, above=True),
    "Sampling.top_k": between(0, math.inf),
    "Sampling.min_p": between(0, 1),
    "Sampling.typical_p": between(0, 1, above=True),
    "Sampling.repetition_penalty": between(0, 10, above=True),
    "Sampling.presence_penalty": between(-2, 2),
    "Sampling.frequency_penalty": between(-2, 2),
    "Sampling.n": between(1, 16),
    "Sampling.logit_bias": at_most(1024, between(-100, 100)),
    "Sampling.allowed_token_ids": at_most(1024),
    "Stopping.max_tokens": between(1, math.inf),
    "Stopping.min_tokens": between(0, math.inf),
    "Stopping.stop": at_most(16, length(1, 256, "bytes")),
    "Stopping.stop_token_ids": at_most(64),
    "Stopping.time_limit": seconds(0, math.inf, above=True),
    "OutputOptions.top_logprobs": between(0, 20),
    "OutputOptions.prompt_logprobs": between(0, 20),
    "CacheOptions.salt": length(0, 128, "bytes"),
    "AdapterPolicy.on_cold": on_cold,
    "AdapterPolicy.max_load_wait": seconds(0, math.inf),
    "StreamOptions.min_tokens_per_chunk": between(1, 256),
    "StreamOptions.max_chunk_delay": seconds(0, 10),
}


def check_spec(spec: GenerateSpec, path: str, streaming: bool) -> None:
    """Check everything that needs no model. `path`: where the spec is in the request, such as "spec".

    Raises FeatureUnsupported for the first field that this server does not support, else InvalidRequest with every
    field that is at fault.
    """
    violations = [*check_message(spec, path), *_check_spec(spec, path, streaming)]
    if violations:
        raise InvalidRequest(*violations)


def check_message(message: Message, path: str) -> Iterator[Violation]:
    """What the table says of a message's fields and of those of its messages. Raises FeatureUnsupported."""
    kind = message.DESCRIPTOR.name
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise FeatureUnsupported(
            f"{path}.{unknown[0].field_number}", "is a field that this server's version of the contract does not have"
        )
    for field, value in message.ListFields():
        where = f"{path}.{field.name}"
        if f"{kind}.{field.name}" in UNSUPPORTED_FIELDS:
            raise FeatureUnsupported(where)
        rule = RULES.get(f"{kind}.{field.name}")
        if rule is not None:
            yield from (Violation(where + suffix, problem) for suffix, problem in rule(value))
        if field.message_type is None or field.message_type.file.package != message.DESCRIPTOR.file.package:
            continue  # a scalar, or a type of google.protobuf
        if isinstance(value, Message):
            yield from check_message(value, where)
        elif not field.message_type.GetOptions().map_entry:
            for index, item in enumerate(value):
                yield from check_message(item, f"{where}[{index}]")


def _check_spec(spec: GenerateSpec, path: str, streaming: bool) -> Iterator[Violation]:
    """What the table cannot say: required fields, and fields that exclude each other."""
    if not spec.model:
        yield Violation(f"{path}.model", "is required: name a model, an adapter or a route")
    yield from check_prompt(spec.prompt, f"{path}.prompt")
    stopping, output = spec.stopping, spec.output
    if stopping.max_tokens > 0 and stopping.min_tokens > stopping.max_tokens:
        yield Violation(
            f"{path}.stopping.min_tokens", f"is {stopping.min_tokens}, more than max_tokens, {stopping.max_tokens}"
        )
    if output.top_logprobs > 0 and output.HasField("logprobs") and not output.logprobs:
        yield Violation(f"{path}.output.top_logprobs", "asks for log-probabilities, and logprobs is false")
    if not streaming and spec.HasField("stream"):
        yield Violation(f"{path}.stream", "has a meaning for StreamGenerate alone; leave it out")


def check_prompt(prompt: Prompt, path: str) -> Iterator[Violation]:
    """A prompt must be there, be one thing, and not be empty (text: the table says so)."""
    match prompt.WhichOneof("content"):
        case None:
            yield Violation(path, "is required: give text, token_ids or chat")
        case "token_ids":
            if not prompt.token_ids.ids:
                yield Violation(f"{path}.token_ids", "is empty")
            if prompt.HasField("add_special_tokens"):
                yield Violation(f"{path}.add_special_tokens", "must be absent with token_ids: nothing is added to them")
        case "chat":
            chat = prompt.chat
            if not chat.messages:
                yield Violation(f"{path}.chat.messages", "is empty")
            for index, message in enumerate(chat.messages):
                if not message.role:
                    yield Violation(f"{path}.chat.messages[{index}].role", "is required")
            if chat.add_generation_prompt and chat.continue_final_message:
                yield Violation(f"{path}.chat.continue_final_message", "excludes add_generation_prompt")


# ---- from a valid spec to what the engine and the output side need ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What of each output goes to the caller, and which text ends it."""

    text: bool
    token_ids: bool
    logprobs: bool
    skip_special_tokens: bool
    stop: tuple[str, ...]
    include_stop: bool
    min_tokens: int  # before these no stop string counts
    fills_context: bool  # the caller set no max_tokens: running into it is the context's limit
    chunk_tokens: float  # hold tokens back until there are this many; inf: until the output ends
    chunk_delay_seconds: float  # but no longer than this

    @classmethod
    def of(cls, spec: GenerateSpec, streaming: bool) -> "OutputForm":
        output, stopping, stream = spec.output, spec.stopping, spec.stream
        text = output.text if output.HasField("text") else True
        delay = duration_seconds(stream.max_chunk_delay) if stream.HasField("max_chunk_delay") else 0.1
        return cls(
            text=text,
            token_ids=output.token_ids if output.HasField("token_ids") else not text,
            logprobs=output.logprobs or output.top_logprobs > 0,
            skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
            stop=tuple(dict.fromkeys(stopping.stop)),
            include_stop=stopping.include_stop,
            min_tokens=stopping.min_tokens,
            fills_context=not stopping.HasField("max_tokens"),
            chunk_tokens=max(1, stream.min_tokens_per_chunk) if streaming else math.inf,
            chunk_delay_seconds=delay if streaming else math.inf,
        )


def merged_sampling(spec: Sampling, defaults: Sampling) -> Sampling:
    """What the caller set, and for what is absent the defaults. A list or map counts as set if it is not empty."""
    merged = Sampling()
    merged.CopyFrom(defaults)
    for field, _ in spec.ListFields():
        merged.ClearField(field.name)  # type: ignore[arg-type]  # lists must be replaced, not appended to
    merged.MergeFrom(spec)
    return merged


def sampling_params(
    spec: GenerateSpec,
    sampling: Sampling,  # merged
    limits: ModelLimits,
    eos_token_ids: tuple[int, ...],
    prompt_tokens: int,
    seed: int,
    path: str,
) -> SamplingParams:
    """The parameters of the first output. Raises PromptTooLong and, for ids outside the vocabulary, InvalidRequest."""
    stopping, output = spec.stopping, spec.output
    max_tokens = room_for_output(spec, limits, prompt_tokens, path)
    _check_vocabulary(spec, sampling, limits.vocab_size, path)
    if stopping.min_tokens > max_tokens:
        problem = f"is {stopping.min_tokens}, and the context has room for {max_tokens}"
        raise InvalidRequest.at(f"{path}.stopping.min_tokens", problem)

    def given(name: str, default: float) -> float:
        return float(getattr(sampling, name)) if sampling.HasField(name) else default  # type: ignore[arg-type]

    return SamplingParams(
        temperature=given("temperature", 1.0),
        top_k=min(sampling.top_k, limits.vocab_size),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        typical_p=given("typical_p", 1.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        seed=seed,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids) or None,
        max_tokens=max_tokens,
        min_tokens=stopping.min_tokens,
        stop_token_ids=tuple(stopping.stop_token_ids),
        eos_token_ids=() if stopping.ignore_eos else eos_token_ids,
        num_logprobs=output.top_logprobs if output.logprobs or output.top_logprobs else None,
        num_prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        time_limit_seconds=duration_seconds(stopping.time_limit) if stopping.HasField("time_limit") else None,
    )


def room_for_output(spec: GenerateSpec, limits: ModelLimits, prompt_tokens: int, path: str) -> int:
    """The most tokens an output may have: what the caller asked for, else what the context leaves.

    Raises PromptTooLong.
    """
    room = limits.max_model_len - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"{path}.prompt",
            f"has {prompt_tokens} tokens; the context of {limits.max_model_len}, less one for the output, takes "
            f"{limits.max_model_len - 1}. Shorten it, or set truncate_to_tokens",
            prompt_tokens,
            limits.max_model_len - 1,
        )
    if not spec.stopping.HasField("max_tokens"):
        return room
    if spec.stopping.max_tokens > room:
        raise PromptTooLong(
            f"{path}.stopping.max_tokens",
            f"is {spec.stopping.max_tokens}; behind a prompt of {prompt_tokens} tokens the context of "
            f"{limits.max_model_len} has room for {room}. Ask for less, or leave max_tokens out",
            prompt_tokens,
            limits.max_model_len,
        )
    return spec.stopping.max_tokens


def derived_seed(seed: int, output_index: int) -> int:
    """The seed of an output after the first, which has the request's own: n changes nothing for it."""
    digest = hashlib.blake2b(seed.to_bytes(8) + output_index.to_bytes(4), digest_size=8)
    return int.from_bytes(digest.digest())


def duration_seconds(duration: Duration) -> float:
    return float(duration.seconds) + duration.nanos * 1e-9


def _check_vocabulary(spec: GenerateSpec, sampling: Sampling, vocab_size: int, path: str) -> None:
    places = {
        "sampling.logit_bias": sampling.logit_bias,
        "sampling.allowed_token_ids": sampling.allowed_token_ids,
        "stopping.stop_token_ids": spec.stopping.stop_token_ids,
        "prompt.token_ids.ids": spec.prompt.token_ids.ids,
    }
    for place, token_ids in places.items():
        largest = max(token_ids, default=0)
        if largest >= vocab_size:
            raise InvalidRequest.at(f"{path}.{place}", f"holds {largest}, and the vocabulary has {vocab_size} tokens")
