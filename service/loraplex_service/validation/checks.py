"""Checks requests against the table of limits, and against the rules that no table can state. Knows no model."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from loraplex.v1.adapters_pb2 import CreateAdapterRequest
from loraplex.v1.generation_pb2 import Constraint, GenerateSpec, Watermark
from loraplex.v1.inference_pb2 import Candidate, GenerateRequest, ScoreRequest, StreamGenerateRequest
from loraplex.v1.pooling_pb2 import ClassifyRequest, EmbedRequest, RerankRequest
from loraplex.v1.prompt_pb2 import TOOL_MODE_REQUIRED, Chat, ChatMessage, Prompt, Tool
from loraplex.v1.tokenizer_pb2 import DetokenizeRequest, TokenizeRequest
from loraplex_adapters.grammar import DIGEST, ID_RULE, is_id
from loraplex_service.errors import FeatureUnsupported, InvalidRequest, Violation
from loraplex_service.names.grammar import model_id, tenant_id
from loraplex_service.validation import dialects
from loraplex_service.validation.dialects import REFUSED, kind_of
from loraplex_service.validation.limits import LIMITS, TOTALS, Entries, Total

# What the contract has and this server does not. Refused by name; ServerInfo lists them.
UNSUPPORTED_FIELDS: tuple[str, ...] = ()

_LIMITS = {**LIMITS, **dialects.LIMITS}
_OF_ENTRIES = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)


def check_request(request: Message) -> None:
    """Check everything that needs no model. Raises InvalidRequest with every field at fault, FeatureUnsupported."""
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
    kind = kind_of(message.DESCRIPTOR)
    if kind in TOTALS:
        _check_total(message, TOTALS[kind], path)
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise FeatureUnsupported.unknown(_at(path, str(unknown[0].field_number)))
    for field, value in message.ListFields():
        where, name = _at(path, field.name), f"{kind}.{field.name}"
        if name in UNSUPPORTED_FIELDS:
            raise FeatureUnsupported(where)
        if name in REFUSED:
            raise FeatureUnsupported(where, REFUSED[name])
        limit = _LIMITS.get(name)
        problems = [] if limit is None else list(limit.problems(value))
        yield from (Violation(where + suffix, problem) for suffix, problem in problems)
        if not problems and not (isinstance(limit, Entries) and limit.alone):
            for place, part in _parts(field, value):
                yield from check_message(part, where + place)
    if kind in _RULES:
        yield from _RULES[kind](message, path)


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
    yield from _check_message(spec, path)
    stopping, output = spec.stopping, spec.output
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens >= 0:
        problem = f"is {stopping.min_tokens}, more than max_tokens, {stopping.max_tokens}"
        yield Violation(_at(path, "stopping.min_tokens"), problem)
    if output.HasField("logprobs") and not output.logprobs:
        for name in ("top_logprobs", "logprob_token_ids"):
            if getattr(output, name):
                yield Violation(_at(path, f"output.{name}"), "asks for log-probabilities, and logprobs is false")
    if spec.sampling.HasField("best_of") and spec.sampling.best_of < spec.sampling.n:
        problem = f"is {spec.sampling.best_of}, fewer than n, {spec.sampling.n}"
        yield Violation(_at(path, "sampling.best_of"), problem)
    if spec.HasField("beam_search"):
        yield from _check_beam_search(spec, path)


def _check_beam_search(spec: GenerateSpec, path: str) -> Iterator[Violation]:
    """The violations of a spec that asks for a search."""
    if not spec.beam_search.num_beams:
        yield Violation(_at(path, "beam_search.num_beams"), "is required: how many beginnings go on")
    if spec.sampling.n > spec.beam_search.num_beams:
        problem = f"is {spec.sampling.n}, more than beam_search.num_beams, {spec.beam_search.num_beams}"
        yield Violation(_at(path, "sampling.n"), problem)
    if spec.stopping.HasField("max_tokens") and not spec.stopping.max_tokens:
        yield Violation(_at(path, "stopping.max_tokens"), "is 0, and beam_search searches for tokens")
    for part, names in _NOT_SEARCHED.items():
        for field, value in getattr(spec, part).ListFields():
            if field.name in names and not (field.name == "temperature" and value == 0):
                yield Violation(_at(path, f"{part}.{field.name}"), _IN_A_SEARCH)
    for name in ("drafts", "watermark"):
        if spec.HasField(name):
            yield Violation(_at(path, name), _IN_A_SEARCH)
    if spec.stopping.stop and spec.output.HasField("skip_special_tokens") and not spec.output.skip_special_tokens:
        problem = "is false, and a beam_search looks for stop strings in text without special tokens"
        yield Violation(_at(path, "output.skip_special_tokens"), problem)


def _check_message(spec: GenerateSpec, path: str) -> Iterator[Violation]:
    """The violations of what is asked of an output that is read as a message."""
    output = spec.output
    if output.parse_message and not spec.prompt.HasField("chat"):
        yield Violation(_at(path, "output.parse_message"), "goes with prompt.chat alone; leave it out")
    elif output.parse_message and output.HasField("text") and not output.text:
        yield Violation(_at(path, "output.parse_message"), "reads the text, and text is false")
    if spec.HasField("constraint") and requires_calls(spec.prompt.chat):
        yield Violation(_at(path, "constraint"), "excludes a tool_choice that requires calls")


def requires_calls(chat: Chat) -> bool:
    """Whether each output has to call a tool."""
    return chat.tool_choice.mode == TOOL_MODE_REQUIRED or bool(chat.tool_choice.name)


def _check_chat(chat: Chat, path: str) -> Iterator[Violation]:
    names = [tool.name for tool in chat.tools]
    if twice := [name for name in names if names.count(name) > 1]:
        yield Violation(_at(path, "tools"), f"has two tools of the name {twice[0]!r}")
    choice = chat.tool_choice
    if not chat.HasField("tool_choice"):
        return
    match choice.WhichOneof("kind"):
        case None:
            yield Violation(_at(path, "tool_choice"), "is empty: give mode or name, or leave it out")
        case "name" if choice.name not in names:
            yield Violation(_at(path, "tool_choice.name"), f"is {choice.name!r}, which is none of the tools")
        case "mode" if choice.mode == TOOL_MODE_REQUIRED and not names:
            yield Violation(_at(path, "tool_choice.mode"), "requires a call, and there are no tools")


def _check_tool(tool: Tool, path: str) -> Iterator[Violation]:
    if not _TOOL_NAME.fullmatch(tool.name):
        problem = "must be letters and digits of ASCII, and _ - . / : besides"
        yield Violation(_at(path, "name"), problem if tool.name else "is required")


def _check_watermark(watermark: Watermark, path: str) -> Iterator[Violation]:
    if not watermark.key:
        yield Violation(_at(path, "key"), "is required: from 16 to 64 bytes, which a detector needs as well")


def _check_constraint(constraint: Constraint, path: str) -> Iterator[Violation]:
    kind = constraint.WhichOneof("kind")
    if kind is None:
        yield Violation(path, "is empty: give json_schema, json_object, regex, choices or grammar, or leave it out")
    elif kind == "choices" and not constraint.choices.values:
        yield Violation(_at(path, "choices.values"), "is empty; give at least one")


def _check_streaming(request: StreamGenerateRequest, path: str) -> Iterator[Violation]:
    yield from _check_stream(request, path)
    ranked = {"sampling.best_of": request.spec.sampling.HasField("best_of")}
    ranked["beam_search"] = request.spec.HasField("beam_search")
    for name, is_given in ranked.items():
        if is_given:
            problem = "ranks outputs once all have ended: nothing can be streamed. Use Generate or BatchGenerate"
            yield Violation(_at(path, f"spec.{name}"), problem)


def _check_unary(spec: GenerateSpec, path: str) -> Iterator[Violation]:
    if spec.HasField("stream"):
        yield Violation(_at(path, "stream"), "has a meaning for StreamGenerate alone; leave it out")


def _check_generate(request: GenerateRequest, path: str) -> Iterator[Violation]:
    yield from _check_stream(request, path)
    yield from _check_unary(request.spec, _at(path, "spec"))


def _check_stream(request: GenerateRequest | StreamGenerateRequest | ScoreRequest, path: str) -> Iterator[Violation]:
    if not request.HasField("spec"):
        yield Violation(_at(path, "spec"), "is required")


def _check_score(request: ScoreRequest, path: str) -> Iterator[Violation]:
    yield from _check_stream(request, path)
    if not request.candidates:
        yield Violation(_at(path, "candidates"), "is empty; give at least one")
    spec = _at(path, "spec")
    for field, _ in request.spec.ListFields():
        if field.name not in _SCORED:
            yield Violation(_at(spec, field.name), _NOT_SCORED)
    for field, _ in request.spec.output.ListFields():
        if field.name not in ("logprobs", "top_logprobs", "logprob_token_ids"):
            yield Violation(_at(spec, f"output.{field.name}"), _NOT_SCORED)


def _check_candidate(candidate: Candidate, path: str) -> Iterator[Violation]:
    if not candidate.HasField("content"):
        yield Violation(path, "is empty: give text or token_ids")
    elif candidate.HasField("token_ids") and not candidate.token_ids.ids:
        yield Violation(_at(path, "token_ids"), "is empty")


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


def _check_prompts(request: EmbedRequest | ClassifyRequest, path: str) -> Iterator[Violation]:
    yield from _check_model(request, path)
    if not request.prompts:
        yield Violation(_at(path, "prompts"), "is empty; give at least one")


def _check_rerank(request: RerankRequest, path: str) -> Iterator[Violation]:
    yield from _check_model(request, path)
    if not request.query:
        yield Violation(_at(path, "query"), "is required")
    if not request.documents:
        yield Violation(_at(path, "documents"), "is empty; give at least one")
    if request.HasField("template") and any(request.template.count(name) != 1 for name in ("{query}", "{document}")):
        yield Violation(_at(path, "template"), "must hold {query} and {document}, once each")


_NamesModel = TokenizeRequest | DetokenizeRequest | EmbedRequest | ClassifyRequest | RerankRequest


def _check_model(request: _NamesModel, path: str) -> Iterator[Violation]:
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
    if not is_id(request.adapter_id):
        yield Violation(_at(path, "adapter_id"), f"must be {ID_RULE}")
    if request.adapter.digest and not _DIGEST.fullmatch(request.adapter.digest):
        yield Violation(_at(path, "adapter.digest"), "must be sha256: and 64 hexadecimal digits")
    if path and request.adapter.source:
        yield Violation(_at(path, "adapter.source"), "must be empty: the files are in the upload")
    elif not path and not request.adapter.source:
        problem = "is required: the directory of the adapter, under a root that is allowed"
        yield Violation(_at(path, "adapter.source"), problem)


_TOOL_NAME = re.compile(r"[\w./:-]+", re.ASCII)
_DIGEST = re.compile(f"sha256:{DIGEST}")
_IN_A_SEARCH = "excludes beam_search; leave out one of them"
_NOT_SEARCHED = {
    "sampling": ("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "best_of"),
    "output": ("prompt_logprobs",),
}
_SCORED = {"model", "prompt", "output", "cache", "adapter_policy", "priority", "client_request_id", "labels"}
_NOT_SCORED = "has no meaning for Score, which generates nothing; leave it out"
_NO_PROMPT = "is required: give text, token_ids or chat"
_RULES: Mapping[str, Callable[[Any, str], Iterator[Violation]]] = {
    "GenerateRequest": _check_generate,
    "StreamGenerateRequest": _check_streaming,
    "ScoreRequest": _check_score,
    "Candidate": _check_candidate,
    "EmbedRequest": _check_prompts,
    "ClassifyRequest": _check_prompts,
    "RerankRequest": _check_rerank,
    "TokenizeRequest": _check_tokenize,
    "DetokenizeRequest": _check_model,
    "GenerateSpec": _check_spec,
    "Constraint": _check_constraint,
    "Watermark": _check_watermark,
    "Prompt": _check_prompt,
    "Chat": _check_chat,
    "ChatMessage": _check_chat_message,
    "Tool": _check_tool,
    "CreateAdapterRequest": _check_registration,
}
