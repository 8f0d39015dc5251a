"""The data port: generation and tokenizer. Health is here too, and both ports have it."""

from collections.abc import Iterable, Sequence
from typing import Unpack, cast

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from loraplex.channel import CallOptions, call_options
from loraplex.generation import (
    GenerateOptions,
    PromptOptions,
    SharedOptions,
    build_spec,
    given_options,
    put_prompt_options,
)
from loraplex.operations.base import GenerationOperation, Operation, StreamOperation, routed
from loraplex.prompts import PromptLike, build_prompt
from loraplex.v1 import generation_pb2, inference_pb2, prompt_pb2, tokenizer_pb2

# HealthCheckRequest and HealthCheckResponse have one field each, and are the same bytes as these messages. So health
# needs no further package.
SERVING = 1  # HealthCheckResponse.SERVING


class GenerateArguments(GenerateOptions, CallOptions, total=False):
    """Options of a generation, and of the call."""


class ScoreArguments(SharedOptions, CallOptions, total=False):
    """Options of a score, and of the call."""


class TokenizeArguments(PromptOptions, CallOptions, total=False):
    """Options of a prompt, and of the call."""


def generate(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    **options: Unpack[GenerateArguments],
) -> Operation[inference_pb2.GenerateResponse]:
    """Generate from a prompt, and return everything at the end.

    An option that is None is as in `spec`. Where `spec` leaves it out too, the route's default holds, else the
    model's, else what is stated here.

    Args:
        model: Name of a model, an adapter, an adapter version or a route. None: that of `spec`.
        prompt: Text, token ids or chat messages. None: that of `spec`.
        spec: Spec to begin with. None: an empty one.
    """
    built, call = _spec_and_call(model, prompt, spec, options)
    request = inference_pb2.GenerateRequest(spec=built)
    return Operation("/loraplex.v1.InferenceService/Generate", request, inference_pb2.GenerateResponse, call)


def stream_generate(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    **options: Unpack[GenerateArguments],
) -> GenerationOperation:
    """Generate from a prompt, and return tokens as they come.

    An option that is None is as in `spec`. Where `spec` leaves it out too, the route's default holds, else the
    model's, else what is stated here.

    Args:
        model: Name of a model, an adapter, an adapter version or a route. None: that of `spec`.
        prompt: Text, token ids or chat messages. None: that of `spec`.
        spec: Spec to begin with. None: an empty one.
    """
    built, call = _spec_and_call(model, prompt, spec, options)
    request = inference_pb2.StreamGenerateRequest(spec=built)
    method = "/loraplex.v1.InferenceService/StreamGenerate"
    return GenerationOperation(method, request, inference_pb2.StreamGenerateResponse, call)


def score(
    model: str,
    prompt: PromptLike,
    candidates: Sequence[str | Sequence[int]],
    **options: Unpack[ScoreArguments],
) -> Operation[inference_pb2.ScoreResponse]:
    """Say how likely each candidate is to follow a prompt. The prompt is computed once for all.

    Args:
        model: Name of a model, an adapter, an adapter version or a route.
        prompt: Text, token ids or chat messages.
        candidates: Texts or token ids. A text is tokenised by itself: a blank in front is its own.
    """
    built, call = _spec_and_call(model, prompt, None, cast(GenerateArguments, options))
    request = inference_pb2.ScoreRequest(spec=built, candidates=[_candidate(each) for each in candidates])
    return Operation("/loraplex.v1.InferenceService/Score", request, inference_pb2.ScoreResponse, call)


def _candidate(given: str | Sequence[int]) -> inference_pb2.Candidate:
    if isinstance(given, str):
        return inference_pb2.Candidate(text=given)
    return inference_pb2.Candidate(token_ids=prompt_pb2.TokenIds(ids=given))


def batch_generate(
    specs: Iterable[generation_pb2.GenerateSpec],
    *,
    max_concurrency: int | None = None,
    **call: Unpack[CallOptions],
) -> StreamOperation[inference_pb2.BatchGenerateResponse]:
    """Generate for many specs. First comes `started` with the ids of all, then each result as soon as it is ready.

    Args:
        specs: What to generate; see generate_spec.
        max_concurrency: Number of specs to run at a time at most. None: the server decides.
    """
    request = inference_pb2.BatchGenerateRequest(specs=specs, max_concurrency=max_concurrency)
    method = "/loraplex.v1.InferenceService/BatchGenerate"
    models = {spec.model for spec in request.specs}
    call = routed(call, models.pop()) if len(models) == 1 else call
    return StreamOperation(method, request, inference_pb2.BatchGenerateResponse, call)


def cancel_generation(
    request_ids: Sequence[str] = (), *, client_request_ids: Sequence[str] = (), **call: Unpack[CallOptions]
) -> Operation[inference_pb2.CancelGenerationResponse]:
    """Cancel generations by their ids, when the calls themselves are out of reach.

    Args:
        request_ids: Ids that the server gave.
        client_request_ids: Ids that you gave.
    """
    request = inference_pb2.CancelGenerationRequest(request_ids=request_ids, client_request_ids=client_request_ids)
    method = "/loraplex.v1.InferenceService/CancelGeneration"
    return Operation(method, request, inference_pb2.CancelGenerationResponse, call)


def _spec_and_call(
    model: str | None,
    prompt: PromptLike | None,
    spec: generation_pb2.GenerateSpec | None,
    options: GenerateArguments,
) -> tuple[generation_pb2.GenerateSpec, CallOptions]:
    call = call_options(options)
    rest = {name: value for name, value in options.items() if name not in call}
    built = build_spec(model, prompt, spec=spec, **cast(GenerateOptions, rest))
    if (own := built.client_request_id) and own.isascii() and own.isprintable():
        # Proxies on the way see metadata only, which holds no other characters.
        call["metadata"] = {"x-request-id": own, **(call.get("metadata") or {})}
    return built, routed(call, built.model)


def tokenize(
    model: str,
    prompt: PromptLike,
    *,
    include_offsets: bool | None = None,
    include_text: bool | None = None,
    **options: Unpack[TokenizeArguments],
) -> Operation[tokenizer_pb2.TokenizeResponse]:
    """Tokenise text or chat messages exactly as a generation would.

    Args:
        model: Name of a model, an adapter, an adapter version or a route, whose tokenizer is used.
        prompt: Text or chat messages.
        include_offsets: Whether to return where in the text each token is. None: no.
        include_text: Whether to return the text that was tokenised, as the chat template rendered it. None: no.
    """
    request = tokenizer_pb2.TokenizeRequest(
        model=model, prompt=build_prompt(prompt), include_offsets=include_offsets, include_text=include_text
    )
    put_prompt_options(request.prompt, given_options(options))
    method = "/loraplex.v1.TokenizerService/Tokenize"
    return Operation(method, request, tokenizer_pb2.TokenizeResponse, call_options(options))


def detokenize(
    model: str,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool | None = None,
    **call: Unpack[CallOptions],
) -> Operation[tokenizer_pb2.DetokenizeResponse]:
    """Turn tokens into text.

    Args:
        model: Name of a model, an adapter, an adapter version or a route, whose tokenizer is used.
        token_ids: Tokens to turn into text.
        skip_special_tokens: Whether to leave special tokens out of the text. None: yes.
    """
    request = tokenizer_pb2.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
    return Operation("/loraplex.v1.TokenizerService/Detokenize", request, tokenizer_pb2.DetokenizeResponse, call)


def check_health(service: str = "", **call: Unpack[CallOptions]) -> Operation[Int32Value]:
    """Say whether the server ("", the default), one of its services, or "models/{model}" can be used now."""
    return Operation("/grpc.health.v1.Health/Check", StringValue(value=service), Int32Value, call)


def watch_health(service: str = "", **call: Unpack[CallOptions]) -> StreamOperation[Int32Value]:
    """Receive the same now, and then at every change."""
    return StreamOperation("/grpc.health.v1.Health/Watch", StringValue(value=service), Int32Value, call)
