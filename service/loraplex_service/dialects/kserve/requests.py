"""What a request of KServe's asks for, in the words of the contract."""

import asyncio
from collections.abc import Mapping

import msgspec

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex_service.dialect_stubs.kserve_v2_pb2 import ModelInferRequest
from loraplex_service.dialects.backend import Backend
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.kserve.tensors import Asked
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.http.exchange import MOST_LEVELS, is_deeper
from loraplex_service.http.failures import Refusal
from loraplex_service.http.parameters import INTEGER, INTEGERS, REALS, Parameter, place
from loraplex_service.http.tables import COMPLETIONS
from loraplex_service.ports.wire import SMALL_BYTES

SAMPLING = "sampling_parameters"
MOST_CHARACTERS = 128 << 10  # of it: twice the longest form
_UNSUPPORTED = ("unknown_parameter", "unsupported_parameter")
_ELSEWHERE = {
    "model": "is model_name",
    "prompt": "is the input text_input",
    "stream": "is an input of its own",
    "stream_options": "is of HTTP: ask for num_input_tokens and num_output_tokens",
    "echo": "is what exclude_input_in_output decides",
    "request_id": "is the field id",
    "prompt_cache_key": "is the metadata loraplex-routing-key",
    "return_token_ids": "has no output here; use loraplex.v1 for tokens",
    "prompt_logprobs": "has no output here; use loraplex.v1 for those of prompts",
}


def _is_number(parameter: Parameter) -> bool:
    if parameter.schema is not None:
        return parameter.schema == INTEGER
    message, name = place(GenerateSpec(), parameter.becomes)
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    return not descriptor.is_repeated and descriptor.cpp_type in INTEGERS | REALS


NUMBERS = frozenset(parameter.name for parameter in COMPLETIONS.parameters if _is_number(parameter))


async def draft_of(request: ModelInferRequest, asked: Asked, backend: Backend) -> Draft:
    """The generation that a request asks for. Raises InvalidRequest, FeatureUnsupported, and what names raise."""
    if len(asked.sampling_parameters) > SMALL_BYTES:  # in a thread: the loop has others to serve
        draft, lora_name = await asyncio.to_thread(_said, asked)
    else:
        draft, lora_name = _said(asked)
    spec = draft.spec
    draft.names += [("model", "model_name"), ("prompt.text", "text_input"), ("client_request_id", "id")]
    spec.model, spec.prompt.text = named(request.model_name, request.model_version), asked.text
    if request.id:
        spec.client_request_id = request.id
    if lora_name is not None:
        where = _where(asked, "lora_name")
        spec.model = _adapter(lora_name, where, request, backend)
        draft.names.append(("model", where))
    if {"logprobs", "cumulative_logprob"} & set(asked.outputs):
        spec.output.logprobs = True
    if asked.stream:
        spec.output.text = spec.output.token_ids = True  # of which there are num_output_tokens
        if spec.sampling.n > 1:
            raise FeatureUnsupported(_where(asked, "n"), "a stream is of one output; leave it out")
    return draft


def named(name: str, version: str) -> str:
    """A model, or a version of an adapter, as the contract names it."""
    return f"{name}@{version}" if version else name


def _said(asked: Asked) -> tuple[Draft, object]:
    """What the parameters say: a generation, and the adapter that they name, None: none. Raises as `draft_of` does."""
    given = _parameters(asked.sampling_parameters)
    for name, value in asked.parameters.items():
        if given.setdefault(name, value) != value:
            raise InvalidRequest.at(_of_request(name), f"has another value in {SAMPLING}; give one of them")
    given = {name: _number(value, _where(asked, name)) if name in NUMBERS else value for name, value in given.items()}
    lora_name = given.pop("lora_name", None)
    return _generation(given, asked), lora_name


def _parameters(text: str) -> dict[str, object]:
    """The JSON object that the parameters are. Raises InvalidRequest."""
    if len(text) > MOST_CHARACTERS:
        raise InvalidRequest.at(SAMPLING, f"has {len(text)} characters; at most {MOST_CHARACTERS} are allowed")
    try:
        given = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest.at(SAMPLING, f"is no JSON: {error}") from error
    if not isinstance(given, dict) or is_deeper(given, MOST_LEVELS):
        raise InvalidRequest.at(SAMPLING, f"must be a JSON object, with at most {MOST_LEVELS} in each other")
    return given


def _where(asked: Asked, name: str) -> str:
    """The field that holds a parameter."""
    return _of_request(name) if name in asked.parameters else f"{SAMPLING}.{name}"


def _of_request(name: str) -> str:
    return f"parameters[{name[:100]}]"


def _number(value: object, where: str) -> object:
    """The value, or the number that a text spells, as Triton's clients send them. Raises InvalidRequest."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value, type=int | float)
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise InvalidRequest.at(where, f"{value[:40]!r} is no number, as JSON writes one") from None


def _generation(given: Mapping[str, object], asked: Asked) -> Draft:
    """The parameters are those of /v1/completions, which has vLLM's."""
    for name in given:
        if name in _ELSEWHERE:
            raise FeatureUnsupported(_where(asked, name), _ELSEWHERE[name])
    try:
        read = COMPLETIONS.read(given)
    except Refusal as refusal:
        where = _where(asked, refusal.param or "")[:200]
        problem = refusal.message.removeprefix(f"{refusal.param}: ")
        if refusal.code in _UNSUPPORTED:
            raise FeatureUnsupported(where, problem) from refusal
        raise InvalidRequest.at(where, problem) from refusal
    return Draft(read.message, [(ours, _where(asked, name)) for ours, name in read.paths if ours])


def _adapter(name: object, where: str, request: ModelInferRequest, backend: Backend) -> str:
    """The adapter that the parameters name, which must be one of the model. Raises InvalidRequest, NotFound."""
    if not isinstance(name, str):
        raise InvalidRequest.at(where, "must be a text")
    base = backend.target(named(request.model_name, request.model_version), "model_name").model.name
    if backend.target(name, where).model.name != base:
        raise InvalidRequest.at(where, f"{name[:200]!r} is no adapter of {base}")
    return name
