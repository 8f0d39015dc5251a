"""PoolingService: what a model makes of texts, in numbers. Validate, resolve, tokenise, admit, run."""

import asyncio
import re
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from loraplex.v1 import pooling_pb2_grpc
from loraplex.v1.pooling_pb2 import (
    POOLING_MEAN,
    POOLING_UNSPECIFIED,
    Activation,
    Classification,
    ClassifyRequest,
    ClassifyResponse,
    Embedding,
    EmbedRequest,
    EmbedResponse,
    RankedDocument,
    RerankRequest,
    RerankResponse,
    RunOptions,
)
from loraplex.v1.prompt_pb2 import Prompt
from loraplex_engine.link.messages import AddRequest, EngineLimits
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.admission.tenants import Tenant
from loraplex_service.call import Call, current_call
from loraplex_service.errors import FeatureUnsupported, InvalidRequest, MessageTooLarge
from loraplex_service.names.target import LoadedModel, Target
from loraplex_service.requests.entrance import Entered, Entrance, Size
from loraplex_service.requests.heads import head_of, label_names, probabilities, sigmoid
from loraplex_service.requests.pooling_run import PoolingJob, PoolingRun
from loraplex_service.requests.prompts import TextWork, prompt_tokens

Context = grpc.aio.ServicerContext[Any, Any]

DRAWS_NOTHING = SamplingParams(seed=0, max_tokens=0)
FLOAT_BYTES = 4
MAX_TEXT_CHARS = 4 << 20  # of all texts to be judged together
CHUNK_FLOATS = 1 << 12  # that are worked on before others have their turn


@dataclass(frozen=True, slots=True)
class Asked:
    """What the requests of all methods have in common."""

    operation: str  # its name in telemetry
    model: str
    prompts: Sequence[Prompt]
    field: str  # that the prompts are from
    options: RunOptions


class PoolingServicer(pooling_pb2_grpc.PoolingServiceServicer):
    """Computes prompts for what they are, not for what follows them."""

    def __init__(self, entrance: Entrance, texts: TextWork, answer_bytes: int = 32 << 20) -> None:
        """`answer_bytes`: the limit of an answer."""
        self._entrance = entrance
        self._texts = texts
        self._answer_bytes = answer_bytes

    async def Embed(self, request: EmbedRequest, context: Context) -> EmbedResponse:  # noqa: N802
        def check(model: LoadedModel) -> None:
            num_floats = embedding_params(request, model.limits).dimensions or model.limits.hidden_size
            self._check_answer(len(request.prompts) * num_floats * FLOAT_BYTES)

        def params(target: Target, entered: Entered, counts: Sequence[int]) -> PoolingParams:
            return embedding_params(request, target.model.limits)

        asked = Asked("embeddings", request.model, request.prompts, "prompts", request.options)
        async with self._run(asked, params, check) as (work, counts):
            response = EmbedResponse()
            for values, count in zip(await work.results(), counts, strict=True):
                response.embeddings.append(Embedding(values=array("f", values), prompt_tokens=count))
                await asyncio.sleep(0)  # the numbers of all prompts together take long to write
            response.report.CopyFrom(work.report())
        return response

    async def Classify(self, request: ClassifyRequest, context: Context) -> ClassifyResponse:  # noqa: N802
        response = ClassifyResponse()

        def params(target: Target, entered: Entered, counts: Sequence[int]) -> PoolingParams:
            head = head_of(target, entered, "model")
            response.labels.extend(label_names(target, head.num_labels))
            response.each_token = head.each_token
            num_rows = sum(counts) if head.each_token else len(counts)
            self._check_answer(num_rows * head.num_labels * 2 * FLOAT_BYTES)
            return PoolingParams(method=PoolingMethod.EACH if head.each_token else PoolingMethod.LAST, classify=True)

        asked = Asked("classify", request.model, request.prompts, "prompts", request.options)
        async with self._run(asked, params) as (work, counts):
            for values, count in zip(await work.results(), counts, strict=True):
                classification = Classification(prompt_tokens=count)
                await _add_rows(classification, array("f", values), len(response.labels), request.activation)
                response.classifications.append(classification)
            response.report.CopyFrom(work.report())
        return response

    async def Rerank(self, request: RerankRequest, context: Context) -> RerankResponse:  # noqa: N802
        def params(target: Target, entered: Entered, counts: Sequence[int]) -> PoolingParams:
            head = head_of(target, entered, "model")
            if head.each_token or head.num_labels > 2:
                kind = "tokens" if head.each_token else f"texts with {head.num_labels} labels"
                name = entered.target.adapter_version or entered.target.model
                problem = f"{name} classifies {kind}: texts with one label, or two, are needed"
                raise FeatureUnsupported("model", problem)
            return PoolingParams(classify=True)

        texts = rerank_texts(request)
        prompts = [Prompt(text=text) for text in texts]
        asked = Asked("rerank", request.model, prompts, "documents", request.options)
        async with self._run(asked, params) as (work, counts):
            logits = [array("f", values) for values in await work.results()]
            margins = [values[-1] - (values[0] if len(values) == 2 else 0.0) for values in logits]
            order: Sequence[int] = range(len(margins))
            best = sorted(order, key=lambda index: -margins[index])[: request.top_n or len(margins)]
            return RerankResponse(
                documents=[
                    RankedDocument(
                        index=index, score=sigmoid(margins[index]), logit=margins[index], prompt_tokens=counts[index]
                    )
                    for index in (sorted(best) if request.keep_order else best)
                ],
                report=work.report(),
            )

    @asynccontextmanager
    async def _run(
        self,
        asked: Asked,
        params: Callable[[Target, Entered, Sequence[int]], PoolingParams],
        check: Callable[[LoadedModel], None] = lambda model: None,
    ) -> AsyncIterator[tuple[PoolingRun, list[int]]]:
        """Take a request to its run, and the numbers of its prompts' tokens.

        `check`: raises what is wrong with the request for this model, before anything is done. `params`: what the
        engine is asked for, once it has read the adapter. However the block ends, it then forgets the request.
        """
        options = asked.options
        with self._entrance.requests.known(current_call()) as known:
            call = known.call
            tenant = self._entrance.tenants.get(call.tenant)
            _note_labels(call, options)
            target = await self._entrance.target(call, tenant, asked.model, "model")
            check(target.model)
            tokens = await self._tokens(asked, target.model, tenant)
            counts = [len(token_ids) for token_ids in tokens]
            at_once = min(len(tokens), target.model.limits.max_num_seqs)
            held_back = sum(sorted(counts)[:-at_once])
            size = Size(sum(counts), at_once, max_tokens=0, held_back_tokens=held_back)
            policy = options.adapter_policy
            async with self._entrance.entered(known, tenant, target, policy, size, None, "model") as entered:
                entered.target.ClearField("constraint_source")  # a form is one of outputs, and there are none
                pooling = params(target, entered, counts)
                job = PoolingJob(
                    request_id=call.request_id,
                    client_request_id=call.client_request_id,
                    labels=call.labels,
                    operation=asked.operation,
                    tenant=tenant.name,
                    target=entered.target,
                    adapter=entered.adapter,
                    prompts=[_added(tenant, options, entered, token_ids, pooling) for token_ids in tokens],
                    at_once=at_once,
                    arrival=call.arrival,
                    adapter_load_seconds=entered.wait.seconds,
                )
                run = PoolingRun(job, target.model.client, entered.successor, entered.start)
                async with self._entrance.working(known, run):
                    yield run, counts

    async def _tokens(self, asked: Asked, model: LoadedModel, tenant: Tenant) -> list[list[int]]:
        tokens: list[list[int]] = []
        for index, prompt in enumerate(asked.prompts):
            path = f"{asked.field}[{index}]"
            tokens.append(await prompt_tokens(prompt, model, self._texts, tenant, path, num_drawn=0))
            await asyncio.sleep(0)
        return tokens

    def _check_answer(self, size: int) -> None:
        if size > self._answer_bytes:
            raise MessageTooLarge.answer(size, self._answer_bytes)


def embedding_params(request: EmbedRequest, limits: EngineLimits) -> PoolingParams:
    """How the model's hidden states become vectors. Raises InvalidRequest, FeatureUnsupported."""
    stated = limits.pooling
    if request.dimensions > limits.hidden_size:
        problem = f"is {request.dimensions}, and the model's vectors have {limits.hidden_size} numbers"
        raise InvalidRequest.at("dimensions", problem)
    if request.pooling == POOLING_UNSPECIFIED:
        if stated.problem:
            problem = f"must be given: the checkpoint's own way cannot be followed, since its {stated.problem}"
            raise FeatureUnsupported("pooling", problem)
        method = stated.method
    else:
        method = PoolingMethod.MEAN if request.pooling == POOLING_MEAN else PoolingMethod.LAST
    normalize = request.normalize if request.HasField("normalize") else stated.normalize
    return PoolingParams(method=method, dimensions=request.dimensions or None, normalize=normalize)


def _note_labels(call: Call, options: RunOptions) -> None:
    call.labels = dict(options.labels)
    if options.HasField("client_request_id"):
        call.client_request_id = options.client_request_id


def _added(
    tenant: Tenant, options: RunOptions, entered: Entered, token_ids: list[int], pooling: PoolingParams
) -> AddRequest:
    """The request to the engine for one prompt. It gets its id when it is sent."""
    return AddRequest(
        request_id=0,
        prompt=token_ids,
        sampling=DRAWS_NOTHING,
        adapter=entered.adapter,
        cache_salt=tenant.cache_salt(options.cache.salt),
        bypass_prefix_cache=options.cache.bypass_prefix_cache,
        priority=-tenant.priority(options.priority),  # higher is first for callers, lower is first for engines
        tenant=tenant.name,
        weight=tenant.config.weight,
        adapter_wait_seconds=entered.wait.seconds_left,
        pooling=pooling,
    )


async def _add_rows(
    classification: Classification, logits: "array[float]", num_labels: int, activation: Activation.ValueType
) -> None:
    """Add rows of logits and their probabilities, a few at a time."""
    step = max(1, CHUNK_FLOATS // num_labels) * num_labels
    for start in range(0, len(logits), step):
        part = logits[start : start + step]
        classification.logits.extend(part)
        classification.probabilities.extend(probabilities(part, num_labels, activation))
        await asyncio.sleep(0)


def rerank_texts(request: RerankRequest) -> list[str]:
    """What the model reads of each document. Raises InvalidRequest for too much in all."""
    template = request.template if request.HasField("template") else "{query}\n{document}"
    pieces = re.split(r"(\{query\}|\{document\})", template)
    length = len(request.documents) * (len(template) + len(request.query)) + sum(map(len, request.documents))
    if length > MAX_TEXT_CHARS:
        problem = f"come to {length} characters with the query and the template; {MAX_TEXT_CHARS} are allowed in all"
        raise InvalidRequest.at("documents", problem)
    return [
        "".join({"{query}": request.query, "{document}": document}.get(piece, piece) for piece in pieces)
        for document in request.documents
    ]
