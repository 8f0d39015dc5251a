"""The data port: generation, tokenizer. And health, which both ports have."""

from collections.abc import Iterable, Sequence
from typing import Unpack, cast

from grpc_health.v1 import health_pb2

from loraplex.channel import CallOptions, call_options
from loraplex.generation import GenerateOptions, generate_spec
from loraplex.operations.base import Operation
from loraplex.prompts import PromptLike, build_prompt
from loraplex.v1 import generation_pb2, inference_pb2, tokenizer_pb2


class GenerateArguments(GenerateOptions, CallOptions, total=False):
    """What a generation can be told, and how it is called."""


def generate(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    **options: Unpack[GenerateArguments],
) -> Operation[inference_pb2.GenerateResponse]:
    """Generate from a prompt (text, token ids, or chat messages) and return everything at the end."""
    built, call = _spec_and_call(model, prompt, spec, options)
    request = inference_pb2.GenerateRequest(spec=built)
    return Operation("/loraplex.v1.InferenceService/Generate", request, inference_pb2.GenerateResponse, call)


def stream_generate(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    **options: Unpack[GenerateArguments],
) -> Operation[inference_pb2.StreamGenerateResponse]:
    """Generate from a prompt (text, token ids, or chat messages) and return tokens as they come."""
    built, call = _spec_and_call(model, prompt, spec, options)
    request = inference_pb2.StreamGenerateRequest(spec=built)
    method = "/loraplex.v1.InferenceService/StreamGenerate"
    return Operation(method, request, inference_pb2.StreamGenerateResponse, call)


def batch_generate(
    specs: Iterable[generation_pb2.GenerateSpec],
    *,
    max_concurrency: int | None = None,
    **call: Unpack[CallOptions],
) -> Operation[inference_pb2.BatchGenerateResponse]:
    """Generate for many specs (see generate_spec): first comes `started` with the ids of all, then each result as it is
    ready, in no particular order.
    """
    request = inference_pb2.BatchGenerateRequest(specs=specs, max_concurrency=max_concurrency)
    method = "/loraplex.v1.InferenceService/BatchGenerate"
    return Operation(method, request, inference_pb2.BatchGenerateResponse, call)


def cancel_generation(
    request_ids: Sequence[str] = (), *, client_request_ids: Sequence[str] = (), **call: Unpack[CallOptions]
) -> Operation[inference_pb2.CancelGenerationResponse]:
    """Cancel generations by the server's ids or by your own, when the calls themselves are out of reach."""
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
    built = generate_spec(model, prompt, spec=spec, **cast(GenerateOptions, rest))
    if (own := built.client_request_id) and own.isascii() and own.isprintable():
        # Proxies on the way see metadata only, which holds no other characters.
        call["metadata"] = {"x-request-id": own, **call.get("metadata", {})}
    return built, call


def tokenize(
    model: str,
    prompt: PromptLike,
    *,
    include_offsets: bool | None = None,
    include_text: bool | None = None,
    **call: Unpack[CallOptions],
) -> Operation[tokenizer_pb2.TokenizeResponse]:
    """Tokenise text or chat messages exactly as a generation would."""
    request = tokenizer_pb2.TokenizeRequest(
        model=model, prompt=build_prompt(prompt), include_offsets=include_offsets, include_text=include_text
    )
    return Operation("/loraplex.v1.TokenizerService/Tokenize", request, tokenizer_pb2.TokenizeResponse, call)


def detokenize(
    model: str,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool | None = None,
    **call: Unpack[CallOptions],
) -> Operation[tokenizer_pb2.DetokenizeResponse]:
    """Turn tokens into text."""
    request = tokenizer_pb2.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
    return Operation("/loraplex.v1.TokenizerService/Detokenize", request, tokenizer_pb2.DetokenizeResponse, call)


def check_health(service: str = "", **call: Unpack[CallOptions]) -> Operation[health_pb2.HealthCheckResponse]:
    """Whether the server ("", the default), one of its services, or "models/{model}" can be used now."""
    request = health_pb2.HealthCheckRequest(service=service)
    return Operation("/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse, call)


def watch_health(service: str = "", **call: Unpack[CallOptions]) -> Operation[health_pb2.HealthCheckResponse]:
    """The same, then every change."""
    request = health_pb2.HealthCheckRequest(service=service)
    return Operation("/grpc.health.v1.Health/Watch", request, health_pb2.HealthCheckResponse, call)
