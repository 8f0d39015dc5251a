"""The data port: what a model makes of texts, in numbers."""

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from loraplex.channel import CallOptions, call_options
from loraplex.generation import PromptOptions, RunOptions, build_run_options, given_options, put_prompt_options
from loraplex.operations.base import Operation, routed
from loraplex.prompts import PromptLike, build_prompt
from loraplex.v1 import pooling_pb2, prompt_pb2


class PoolingArguments(PromptOptions, RunOptions, CallOptions, total=False):
    """Options of prompts, of how they are run, and of the call."""


class RerankArguments(RunOptions, CallOptions, total=False):
    """Options of how the texts are run, and of the call."""


def embed(
    model: str,
    prompts: str | Iterable[PromptLike],
    *,
    pooling: pooling_pb2.Pooling.ValueType | str | None = None,
    dimensions: int | None = None,
    normalize: bool | None = None,
    **options: Unpack[PoolingArguments],
) -> Operation[pooling_pb2.EmbedResponse]:
    """Turn texts into vectors, one for each, in their order.

    Args:
        model: Name of a model, an adapter, an adapter version or a route.
        prompts: Texts, lists of token ids or lists of chat messages. A string is one text.
        pooling: Which hidden states make up a vector: "last" or "mean". None: as the checkpoint says, else last.
        dimensions: How many numbers of each vector to return, its first ones. None: all.
        normalize: Whether vectors are scaled to length 1. None: as the checkpoint says, else yes.
    """
    request = pooling_pb2.EmbedRequest(
        model=model,
        prompts=build_prompts(prompts, options),
        pooling=_pooling(pooling),
        dimensions=dimensions,
        normalize=normalize,
        options=build_run_options(options),
    )
    method = "/loraplex.v1.PoolingService/Embed"
    return Operation(method, request, pooling_pb2.EmbedResponse, routed(call_options(options), model))


def classify(
    model: str,
    prompts: str | Iterable[PromptLike],
    *,
    activation: pooling_pb2.Activation.ValueType | str | None = None,
    **options: Unpack[PoolingArguments],
) -> Operation[pooling_pb2.ClassifyResponse]:
    """Classify texts, or each of their tokens, with an adapter or a model that has a head for it.

    Args:
        model: Name of an adapter or a model with a classification head, an adapter version or a route.
        prompts: Texts, lists of token ids or lists of chat messages. A string is one text.
        activation: How logits become probabilities: "softmax" or "sigmoid". None: sigmoid for one label alone.
    """
    if isinstance(activation, str):
        activation = pooling_pb2.Activation.Value(f"ACTIVATION_{activation.upper()}")
    request = pooling_pb2.ClassifyRequest(
        model=model,
        prompts=build_prompts(prompts, options),
        activation=activation or pooling_pb2.ACTIVATION_UNSPECIFIED,
        options=build_run_options(options),
    )
    method = "/loraplex.v1.PoolingService/Classify"
    return Operation(method, request, pooling_pb2.ClassifyResponse, routed(call_options(options), model))


def rerank(
    model: str,
    query: str,
    documents: Iterable[str],
    *,
    template: str | None = None,
    top_n: int | None = None,
    keep_order: bool | None = None,
    **options: Unpack[RerankArguments],
) -> Operation[pooling_pb2.RerankResponse]:
    """Say how well documents answer a query, with an adapter or a model that has a head for it, the best one first.

    Args:
        model: Name of an adapter or a model with a classification head, an adapter version or a route.
        query: What is asked.
        documents: What may answer it.
        template: Text with {query} and {document} in it, as the head was trained with. None: two lines.
        top_n: How many documents to return, the best ones. None: all.
        keep_order: Whether documents come in the order in which they were given. None: no.
    """
    request = pooling_pb2.RerankRequest(
        model=model,
        query=query,
        documents=documents,
        template=template,
        top_n=top_n,
        keep_order=keep_order,
        options=build_run_options(options),
    )
    method = "/loraplex.v1.PoolingService/Rerank"
    return Operation(method, request, pooling_pb2.RerankResponse, routed(call_options(options), model))


def _pooling(pooling: pooling_pb2.Pooling.ValueType | str | None) -> pooling_pb2.Pooling.ValueType:
    if isinstance(pooling, str):
        return pooling_pb2.Pooling.Value(f"POOLING_{pooling.upper()}")
    return pooling or pooling_pb2.POOLING_UNSPECIFIED


def build_prompts(prompts: str | Iterable[PromptLike], options: Mapping[str, Any]) -> list[prompt_pb2.Prompt]:
    """Build the prompts, each with what the options say of prompts."""
    given = given_options(options)
    built = []
    for each in [prompts] if isinstance(prompts, str) else prompts:
        prompt = prompt_pb2.Prompt()
        prompt.CopyFrom(build_prompt(each))
        put_prompt_options(prompt, given)
        built.append(prompt)
    return built
