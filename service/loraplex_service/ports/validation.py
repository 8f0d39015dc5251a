"""Checks requests against the table of limits, and turns a valid GenerateSpec into SamplingParams.

Nothing here knows a model but `sampling_params`, which merges its defaults and checks ids against its vocabulary.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from loraplex.v1.adapters_pb2 import CreateAdapterRequest
from loraplex.v1.generation_pb2 import GenerateSpec, Sampling
from loraplex.v1.inference_pb2 import GenerateRequest, StreamGenerateRequest
from loraplex.v1.prompt_pb2 import ChatMessage, Prompt
from loraplex.v1.tokenizer_pb2 import DetokenizeRequest, TokenizeRequest
from loraplex_engine.link.messages import ModelLimits
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.control.requests import ID, model_id, tenant_id
from loraplex_service.errors import FeatureUnsupported, InvalidRequest, PromptTooLong, Violation
from loraplex_service.ports.limits import LIMITS, TOTALS, Entries, Total
from loraplex_service.timestamps import duration_seconds

# What the contract has and this server does not. Refused by name; ServerInfo lists them.
UNSUPPORTED_FIELDS = ("GenerateSpec.constraint", "Sampling.bad_words", "Chat.tools")

# Beyond these, fields that the contract does not have are not even looked at one by one: that takes long.
MAX_UNKNOWN_BYTES = 64 << 10
TOKENS_AT_ONCE = 256  # of an answer in one piece: they take less room in it than while they are held back
_OF_ENTRIES = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)
_UNKNOWN = "is a field that this server's version of the contract does not have"


def check_request(request: Message) -> None:
    """Check everything that needs no model. Raises InvalidRequest with every field at fault, FeatureUnsupported."""
    _check_unknown(request)
    _raise(check_message(request))


def check_item(spec: GenerateSpec, path: str) -> None:
    """Check one item of a batch as `check_request` does. `path`: the item's place in the request."""
    _raise([*check_message(spec, path), *_check_unary(spec, path)])


def _raise(violations: Iterable[Violation]) -> None:
    found = tuple(violations)
    if found:
        raise InvalidRequest(*found)


def check_message(message: Message, path: str = "") -> Iterator[Violation]:
    """The violations in a message's fields and in the messages inside it.

    Raises FeatureUnsupported, and InvalidRequest for a message that is too large as a whole.
    """
    kind = message.DESCRIPTOR.name
    if kind in TOTALS:
        _check_total(message, TOTALS[kind], path)
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise FeatureUnsupported(_at(path, str(unknown[0].field_number)), _UNKNOWN)
    for field, value in message.ListFields():
        where, name = _at(path, field.name), f"{kind}.{field.name}"
        if name in UNSUPPORTED_FIELDS:
            raise FeatureUnsupported(where)
        limit = LIMITS.get(name)
        problems = [] if limit is None else list(limit.problems(value))
        yield from (Violation(where + suffix, problem) for suffix, problem in problems)
        if not problems and not (isinstance(limit, Entries) and limit.alone):
            for place, part in _parts(field, value):
                yield from check_message(part, where + place)
    if kind in _RULES:
        yield from _RULES[kind](message, path)


def _check_unknown(request: Message) -> None:
    """Raise FeatureUnsupported if there are more unknown fields than may be looked at one by one."""
    size = request.ByteSize()
    if size <= MAX_UNKNOWN_BYTES:
        return
    known = type(request)()
    known.CopyFrom(request)
    known.DiscardUnknownFields()
    if size - known.ByteSize() > MAX_UNKNOWN_BYTES:
        raise FeatureUnsupported("request", _UNKNOWN)


def _check_total(message: Message, total: Total, path: str) -> None:
    """Raise InvalidRequest as soon as the message is found to hold more than the total."""
    characters = entries = numbers = 0
    for field, value in _fields(message):
        if isinstance(value, Message):
            continue  # its fields come by themselves; a Struct is a Mapping, too
        if isinstance(value, str | bytes):
            characters += len(value)
        elif isinstance(value, Mapping):
            entries += len(value)
            characters += sum(len(text) for text in [*value, *value.values()] if isinstance(text, str))
        elif isinstance(value, Sequence) and field.cpp_type in _OF_ENTRIES:
            entries += len(value)
            characters += sum(len(text) for text in value) if field.message_type is None else 0
        elif isinstance(value, Sequence):
            numbers += len(value)
        if characters > total.characters or entries > total.entries or numbers > total.numbers:
            raise InvalidRequest.at(path or "request", f"is too much as a whole: {total.words} are allowed")


def _fields(message: Message) -> Iterator[tuple[FieldDescriptor, Any]]:
    """The fields that are set, including those of messages inside."""
    for field, value in message.ListFields():
        yield field, value
        for _, part in _parts(field, value):
            yield from _fields(part)


def _parts(field: FieldDescriptor, value: Any) -> Iterator[tuple[str, Message]]:
    """The messages in a field, each with its place in it."""
    if field.message_type is None:
        return
    if isinstance(value, Message):
        yield "", value
    elif isinstance(value, Mapping):
        yield from ((f"[{key[:63]}]", item) for key, item in value.items() if isinstance(item, Message))
    else:
        yield from ((f"[{index}]", item) for index, item in enumerate(value))


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---- what the table cannot say: required fields, and fields that exclude each other ----------------------------------


def _check_spec(spec: GenerateSpec, path: str) -> Iterator[Violation]:
    if not spec.model:
        yield Violation(_at(path, "model"), "is required: name a model, an adapter or a route")
    if not spec.HasField("prompt"):
        yield Violation(_at(path, "prompt"), _NO_PROMPT)
    stopping, output = spec.stopping, spec.output
    if stopping.max_tokens > 0 and stopping.min_tokens > stopping.max_tokens:
        problem = f"is {stopping.min_tokens}, more than max_tokens, {stopping.max_tokens}"
        yield Violation(_at(path, "stopping.min_tokens"), problem)
    if output.top_logprobs > 0 and output.HasField("logprobs") and not output.logprobs:
        yield Violation(_at(path, "output.top_logprobs"), "asks for log-probabilities, and logprobs is false")


def _check_unary(spec: GenerateSpec, path: str) -> Iterator[Violation]:
    if spec.HasField("stream"):
        yield Violation(_at(path, "stream"), "has a meaning for StreamGenerate alone; leave it out")


def _check_generate(request: GenerateRequest, path: str) -> Iterator[Violation]:
    yield from _check_stream(request, path)
    yield from _check_unary(request.spec, _at(path, "spec"))


def _check_stream(request: GenerateRequest | StreamGenerateRequest, path: str) -> Iterator[Violation]:
    if not request.HasField("spec"):
        yield Violation(_at(path, "spec"), "is required")


def _check_prompt(prompt: Prompt, path: str) -> Iterator[Violation]:
    """The violations of a prompt that is absent or empty; the table limits a text's length."""
    match prompt.WhichOneof("content"):
        case None:
            yield Violation(path, _NO_PROMPT)
        case "token_ids":
            if not prompt.token_ids.ids:
                yield Violation(_at(path, "token_ids"), "is empty")
            if prompt.HasField("add_special_tokens"):
                problem = "must be absent with token_ids: nothing is added to them"
                yield Violation(_at(path, "add_special_tokens"), problem)
            if prompt.HasField("literal_content"):
                problem = "must be absent with token_ids, which have no literal text"
                yield Violation(_at(path, "literal_content"), problem)
        case "chat":
            if not prompt.chat.messages:
                yield Violation(_at(path, "chat.messages"), "is empty")
            if prompt.chat.add_generation_prompt and prompt.chat.continue_final_message:
                yield Violation(_at(path, "chat.continue_final_message"), "excludes add_generation_prompt")


def _check_chat_message(message: ChatMessage, path: str) -> Iterator[Violation]:
    if not message.role:
        yield Violation(_at(path, "role"), "is required")


def _check_tokenize(request: TokenizeRequest, path: str) -> Iterator[Violation]:
    yield from _check_model(request, path)
    if not request.HasField("prompt"):
        yield Violation(_at(path, "prompt"), _NO_PROMPT)
    elif request.prompt.HasField("token_ids"):
        yield Violation(_at(path, "prompt.token_ids"), "are tokens already; give text or chat")


def _check_model(request: TokenizeRequest | DetokenizeRequest, path: str) -> Iterator[Violation]:
    if not request.model:
        yield Violation(_at(path, "model"), "is required: name a model, an adapter or a route")


def _check_registration(request: CreateAdapterRequest, path: str) -> Iterator[Violation]:
    for check, name, field in (
        (tenant_id, request.parent, "parent"),
        (model_id, request.adapter.base_model, "adapter.base_model"),
    ):
        try:
            check(name, _at(path, field))
        except InvalidRequest as error:
            yield from error.violations
    if not re.fullmatch(ID, request.adapter_id):
        problem = "must be 1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit"
        yield Violation(_at(path, "adapter_id"), problem)
    if request.adapter.digest and not _DIGEST.fullmatch(request.adapter.digest):
        yield Violation(_at(path, "adapter.digest"), "must be sha256: and 64 hexadecimal digits")
    if path and request.adapter.source:
        yield Violation(_at(path, "adapter.source"), "must be empty: the files are in the upload")
    elif not path and not request.adapter.source:
        problem = "is required: the directory of the adapter, under a root that is allowed"
        yield Violation(_at(path, "adapter.source"), problem)


_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NO_PROMPT = "is required: give text, token_ids or chat"
_RULES: Mapping[str, Callable[[Any, str], Iterator[Violation]]] = {
    "GenerateRequest": _check_generate,
    "StreamGenerateRequest": _check_stream,
    "TokenizeRequest": _check_tokenize,
    "DetokenizeRequest": _check_model,
    "GenerateSpec": _check_spec,
    "Prompt": _check_prompt,
    "ChatMessage": _check_chat_message,
    "CreateAdapterRequest": _check_registration,
}


# ---- from a valid spec to what the engine and the output side need ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutputForm:
    """The parts of each output that go to the caller, and the stop strings."""

    text: bool
    token_ids: bool
    logprobs: bool
    skip_special_tokens: bool
    stop: tuple[str, ...]
    include_stop: bool
    min_tokens: int  # before these no stop string counts
    fills_context: bool  # the output may be as long as the context leaves room for: running into that is its limit
    chunk_tokens: int  # hold tokens back until there are this many
    chunk_delay_seconds: float  # but no longer than this

    @classmethod
    def of(cls, spec: GenerateSpec, streaming: bool, max_tokens: int) -> "OutputForm":
        """`max_tokens`: the limit of each output."""
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
            fills_context=not stopping.HasField("max_tokens") or max_tokens < stopping.max_tokens,
            chunk_tokens=max(1, stream.min_tokens_per_chunk) if streaming else TOKENS_AT_ONCE,
            chunk_delay_seconds=delay if streaming else math.inf,
        )


def merged_sampling(spec: Sampling, defaults: Sampling) -> Sampling:
    """Merge the caller's fields with the defaults for absent ones. A list or map counts as set if it is not empty."""
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
    num_token_ids: int,  # of the tokenizer: the highest, and 1
    prompt_tokens: int,
    seed: int,
    path: str,
) -> SamplingParams:
    """The parameters of the first output.

    Raises PromptTooLong and, for ids outside the vocabulary and where no token is left to draw, InvalidRequest.
    """
    stopping, output = spec.stopping, spec.output
    max_tokens = room_for_output(spec, limits, prompt_tokens, path)
    _check_vocabulary(spec, sampling, limits.vocab_size, path)
    if stopping.min_tokens > max_tokens:
        problem = f"is {stopping.min_tokens}, and the context has room for {max_tokens}"
        raise InvalidRequest.at(f"{path}.stopping.min_tokens", problem)

    def given(name: str, default: float) -> float:
        return float(getattr(sampling, name)) if sampling.HasField(name) else default  # type: ignore[arg-type]

    params = SamplingParams(
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
        num_token_ids=num_token_ids if num_token_ids < limits.vocab_size else None,
        max_tokens=max_tokens,
        min_tokens=stopping.min_tokens,
        stop_token_ids=tuple(stopping.stop_token_ids),
        eos_token_ids=() if stopping.ignore_eos else eos_token_ids,
        num_logprobs=output.top_logprobs if output.logprobs or output.top_logprobs else None,
        num_prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        time_limit_seconds=duration_seconds(stopping.time_limit) if stopping.HasField("time_limit") else None,
    )
    if not params.can_draw:
        problem = "leaves no token to draw: each one ends the output, which min_tokens forbids, or has no text"
        raise InvalidRequest(_of_sampling(spec, "allowed_token_ids", problem, path))
    return params


def room_for_output(spec: GenerateSpec, limits: ModelLimits, prompt_tokens: int, path: str) -> int:
    """The most tokens of an output: the caller's max_tokens, cut if that is allowed, else the rest of the context.

    Raises PromptTooLong.
    """
    room = limits.max_model_len - prompt_tokens
    if room < 1:
        raise PromptTooLong.of(f"{path}.prompt", prompt_tokens, limits.max_model_len)
    if not spec.stopping.HasField("max_tokens"):
        return room
    if spec.stopping.max_tokens > room and not spec.stopping.fit_max_tokens:
        raise PromptTooLong(
            f"{path}.stopping.max_tokens",
            f"is {spec.stopping.max_tokens}; behind a prompt of {prompt_tokens} tokens the context of "
            f"{limits.max_model_len} has room for {room}. Ask for less, set fit_max_tokens, or leave max_tokens out",
            prompt_tokens,
            limits.max_model_len,
        )
    return min(spec.stopping.max_tokens, room)


def derived_seed(seed: int, output_index: int) -> int:
    """The seed of a later output. The first output has the request's own seed, so that n changes nothing for it."""
    digest = hashlib.blake2b(seed.to_bytes(8) + output_index.to_bytes(4), digest_size=8)
    return int.from_bytes(digest.digest())


def _check_vocabulary(spec: GenerateSpec, sampling: Sampling, vocab_size: int, path: str) -> None:
    def problem(token_ids: Iterable[int]) -> str:
        largest = max(token_ids, default=0)
        return f"holds {largest}, and the vocabulary has {vocab_size} tokens" if largest >= vocab_size else ""

    merged = {"logit_bias": sampling.logit_bias, "allowed_token_ids": sampling.allowed_token_ids}
    violations = [
        *(_of_sampling(spec, name, problem(ids), path) for name, ids in merged.items()),
        Violation(f"{path}.stopping.stop_token_ids", problem(spec.stopping.stop_token_ids)),
    ]
    _raise(violation for violation in violations if violation.problem)


def _of_sampling(spec: GenerateSpec, name: str, problem: str, path: str) -> Violation:
    """The violation of a sampling field: of the caller's own, or of a default of the model or route that it named."""
    if getattr(spec.sampling, name):
        return Violation(f"{path}.sampling.{name}", problem)
    return Violation(f"{path}.model", f"has a default sampling whose {name} {problem}" if problem else "")
