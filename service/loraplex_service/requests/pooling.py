"""PoolingService: what a model makes of texts, in numbers. Validate, resolve, tokenise, admit, run."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from loraplex.v1 import pooling_pb2_grpc
from loraplex.v1.pooling_pb2 import (
    POOLING_MEAN,
    POOLING_UNSPECIFIED,
    Embedding,
    EmbedRequest,
    EmbedResponse,
    RunOptions,
)
from loraplex.v1.prompt_pb2 import Prompt
from loraplex_engine.link.messages import AddRequest, EngineLimits
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.admission.tenants import Tenant
from loraplex_service.call import Call, current_call
from loraplex_service.errors import FeatureUnsupported, InvalidRequest, MessageTooLarge
from loraplex_service.names.target import Target
from loraplex_service.requests.entrance import Entered, Entrance, Size
from loraplex_service.requests.in_flight import InFlight
from loraplex_service.requests.pooling_run import PoolingJob, PoolingRun
from loraplex_service.requests.prompts import TextWork, prompt_tokens

Context = grpc.aio.ServicerContext[Any, Any]

DRAWS_NOTHING = SamplingParams(seed=0, max_tokens=0)
FLOAT_BYTES = 4


class PoolingServicer(pooling_pb2_grpc.PoolingServiceServicer):
    """Computes prompts for what they are, not for what follows them."""

    def __init__(self, entrance: Entrance, texts: TextWork, answer_bytes: int = 32 << 20) -> None:
        """`answer_bytes`: the limit of an answer."""
        self._entrance = entrance
        self._texts = texts
        self._answer_bytes = answer_bytes

    async def Embed(self, request: EmbedRequest, context: Context) -> EmbedResponse:  # noqa: N802
        def params(target: Target) -> PoolingParams:
            limits = target.model.limits
            found = embedding_params(request, limits)
            self._check_answer(len(request.prompts) * (found.dimensions or limits.hidden_size))
            return found

        with self._entrance.requests.known(current_call()) as known:
            run = self._run(known, request.model, request.prompts, request.options, params, "embeddings")
            async with run as (work, counts):
                response = EmbedResponse()
                for values, count in zip(await work.results(), counts, strict=True):
                    response.embeddings.append(Embedding(values=array("f", values), prompt_tokens=count))
                    await asyncio.sleep(0)  # the numbers of all prompts together take long to write
                response.report.CopyFrom(work.report())
        return response

    @asynccontextmanager
    async def _run(
        self,
        known: InFlight,
        name: str,
        prompts: Sequence[Prompt],
        options: RunOptions,
        params: Callable[[Target], PoolingParams],
        operation: str,
    ) -> AsyncIterator[tuple[PoolingRun, list[int]]]:
        """Take a request to its run, and the numbers of its prompts' tokens.

        However the block ends, the engine then forgets the request.
        """
        call = known.call
        tenant = self._entrance.tenants.get(call.tenant)
        _note_labels(call, options)
        target = await self._entrance.target(call, tenant, name, "model")
        pooling, model = params(target), target.model
        tokens: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            tokens.append(await prompt_tokens(prompt, model, self._texts, tenant, f"prompts[{index}]", num_drawn=0))
            await asyncio.sleep(0)
        counts = [len(token_ids) for token_ids in tokens]
        at_once = min(len(tokens), model.limits.max_num_seqs)
        held_back = sum(sorted(counts)[:-at_once])
        size = Size(sum(counts), at_once, max_tokens=0, held_back_tokens=held_back)
        async with self._entrance.entered(
            known, tenant, target, options.adapter_policy, size, None, "model"
        ) as entered:
            job = PoolingJob(
                request_id=call.request_id,
                client_request_id=call.client_request_id,
                labels=call.labels,
                operation=operation,
                tenant=tenant.name,
                target=entered.target,
                adapter=entered.adapter,
                prompts=[_added(tenant, options, entered, token_ids, pooling) for token_ids in tokens],
                at_once=at_once,
                arrival=call.arrival,
                adapter_load_seconds=entered.wait.seconds,
            )
            run = PoolingRun(job, model.client, entered.successor, entered.start)
            async with self._entrance.working(known, run):
                yield run, counts

    def _check_answer(self, num_floats: int) -> None:
        if num_floats * FLOAT_BYTES > self._answer_bytes:
            raise MessageTooLarge.answer(num_floats * FLOAT_BYTES, self._answer_bytes)


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
