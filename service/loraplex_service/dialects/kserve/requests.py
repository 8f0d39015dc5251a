"""What a request of KServe's asks for, in the words of the contract."""

import msgspec

from loraplex_service.dialect_stubs.kserve_v2_pb2 import ModelInferRequest
from loraplex_service.dialects.backend import Backend
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.kserve.tensors import Asked
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.http.exchange import MOST_LEVELS, is_deeper
from loraplex_service.http.failures import Refusal
from loraplex_service.http.tables import COMPLETIONS

SAMPLING = "sampling_parameters"
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


def draft_of(request: ModelInferRequest, asked: Asked, backend: Backend) -> Draft:
    """The generation that a request asks for. Raises InvalidRequest, FeatureUnsupported, and what names raise."""
    given = _parameters(asked.sampling_parameters)
    lora_name = given.pop("lora_name", None)
    draft = _generation(given)
    spec = draft.spec
    draft.names += [("model", "model_name"), ("prompt.text", "text_input"), ("client_request_id", "id")]
    spec.model, spec.prompt.text = named(request.model_name, request.model_version), asked.text
    if request.id:
        spec.client_request_id = request.id
    if lora_name is not None:
        spec.model = _adapter(lora_name, request, backend)
        draft.names.append(("model", f"{SAMPLING}.lora_name"))
    if {"logprobs", "cumulative_logprob"} & set(asked.outputs):
        spec.output.logprobs = True
    if asked.stream:
        spec.output.text = spec.output.token_ids = True  # of which there are num_output_tokens
        if spec.sampling.n > 1:
            raise FeatureUnsupported(f"{SAMPLING}.n", "a stream is of one output; leave it out")
    return draft


def named(name: str, version: str) -> str:
    """A model, or a version of an adapter, as the contract names it."""
    return f"{name}@{version}" if version else name


def _parameters(text: str) -> dict[str, object]:
    """The JSON object that the parameters are. Raises InvalidRequest."""
    try:
        given = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest.at(SAMPLING, f"is no JSON: {error}") from error
    if not isinstance(given, dict) or is_deeper(given, MOST_LEVELS):
        raise InvalidRequest.at(SAMPLING, f"must be a JSON object, with at most {MOST_LEVELS} in each other")
    return given


def _generation(given: dict[str, object]) -> Draft:
    """The parameters are those of /v1/completions, which has vLLM's."""
    for name in given:
        if name in _ELSEWHERE:
            raise FeatureUnsupported(f"{SAMPLING}.{name}", _ELSEWHERE[name])
    try:
        read = COMPLETIONS.read(given)
    except Refusal as refusal:
        where = f"{SAMPLING}.{refusal.param or ''}"[:200]
        problem = refusal.message.removeprefix(f"{refusal.param}: ")
        if refusal.code in _UNSUPPORTED:
            raise FeatureUnsupported(where, problem) from refusal
        raise InvalidRequest.at(where, problem) from refusal
    return Draft(read.message, [(ours, f"{SAMPLING}.{name}") for ours, name in read.paths if ours])


def _adapter(name: object, request: ModelInferRequest, backend: Backend) -> str:
    """The adapter that the parameters name, which must be one of the model. Raises InvalidRequest, NotFound."""
    where = f"{SAMPLING}.lora_name"
    if not isinstance(name, str):
        raise InvalidRequest.at(where, "must be a text")
    base = backend.target(named(request.model_name, request.model_version), "model_name").model.name
    if backend.target(name, where).model.name != base:
        raise InvalidRequest.at(where, f"{name[:200]!r} is no adapter of {base}")
    return name
