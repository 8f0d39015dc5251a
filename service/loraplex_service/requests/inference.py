"""InferenceService: validate, resolve, tokenise, admit, run."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc.aio

from loraplex.v1 import inference_pb2_grpc
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import (
    BatchGenerateRequest,
    BatchGenerateResponse,
    BatchStarted,
    CancelGenerationRequest,
    CancelGenerationResponse,
    Candidate,
    Completed,
    Delta,
    Finished,
    GenerateOutput,
    GenerateRequest,
    GenerateResponse,
    PromptLogprobs,
    ScoreRequest,
    ScoreResponse,
    Started,
    StreamGenerateRequest,
    StreamGenerateResponse,
)
from loraplex_service.call import Call, current_call
from loraplex_service.call_errors import error_status, known_error
from loraplex_service.errors import InvalidRequest, MessageTooLarge
from loraplex_service.requests.entrance import Entrance
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.heads import check_generates
from loraplex_service.requests.in_flight import InFlight
from loraplex_service.requests.prepared import Preparation
from loraplex_service.requests.prompts import TextWork
from loraplex_service.requests.run import Event, Run
from loraplex_service.requests.scores import CandidateScores, scoring_spec
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.validation.checks import check_item

Context = grpc.aio.ServicerContext[Any, Any]

BATCH_CONCURRENCY = 16  # items at once, by default: more would only wait in a shared queue

_FIELD_OF_EVENT: dict[type[Event], str] = {
    Started: "started",
    PromptLogprobs: "prompt_logprobs",
    Delta: "delta",
    Finished: "finished",
    Completed: "completed",
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generates text. Every accepted request ends with one Completed, or with one status."""

    def __init__(
        self,
        entrance: Entrance,
        texts: TextWork,
        forms: Forms,
        metrics: RequestMetrics | None = None,
        answer_bytes: int = 32 << 20,
    ) -> None:
        """`metrics`: gets the gaps between tokens; it gets all else as an observer. `answer_bytes`: the limit of an
        answer in one piece, and of each item of a batch.
        """
        self._entrance = entrance
        self._requests = entrance.requests
        self._preparation = Preparation(texts, forms, answer_bytes)
        self._answer_bytes = answer_bytes
        self._token_gaps = (metrics or RequestMetrics()).token_gaps

    async def Generate(self, request: GenerateRequest, context: Context) -> GenerateResponse:  # noqa: N802
        with self._requests.known(current_call()) as known:
            return await self._generate(known, request.spec, "spec")

    async def StreamGenerate(  # noqa: N802
        self, request: StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[StreamGenerateResponse, None]:
        seq = 0
        with self._requests.known(current_call()) as known:
            async with self._run(known, request.spec, "spec", streaming=True) as run, aclosing(run.events()) as events:
                async for event in events:
                    if isinstance(event, Completed):
                        self._entrance.record(known.call, run, "OK")
                        await self._entrance.recorded()  # so that the record exists before the caller knows the end
                    fields: dict[str, Any] = {"seq": seq, _FIELD_OF_EVENT[type(event)]: event}
                    yield StreamGenerateResponse(**fields)
                    seq += 1

    async def BatchGenerate(  # noqa: N802
        self, request: BatchGenerateRequest, context: Context
    ) -> AsyncGenerator[BatchGenerateResponse, None]:
        if not request.specs:
            raise InvalidRequest.at("specs", "is empty; give at least one")
        at_once = request.max_concurrency if request.HasField("max_concurrency") else BATCH_CONCURRENCY
        slots = asyncio.Semaphore(at_once)
        results: asyncio.Queue[BatchGenerateResponse] = asyncio.Queue(1)  # items keep their slots until there is room
        calls = [current_call().item() for _ in request.specs]
        with ExitStack() as all_known:
            items = [all_known.enter_context(self._requests.known(call)) for call in calls]
            yield BatchGenerateResponse(started=BatchStarted(request_ids=[call.request_id for call in calls]))
            tasks = [
                asyncio.create_task(self._batch_item(index, spec, item, slots, results))
                for index, (spec, item) in enumerate(zip(request.specs, items, strict=True))
            ]
            try:
                for _ in tasks:
                    yield await results.get()
                for item in items:
                    if item.missed_deadline is not None:
                        raise item.missed_deadline
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def Score(self, request: ScoreRequest, context: Context) -> ScoreResponse:  # noqa: N802
        with self._requests.known(current_call()) as known:
            spec, response = scoring_spec(request), ScoreResponse()
            scores = CandidateScores(len(request.candidates), request.spec.output, self._answer_bytes)
            async with (
                self._run(known, spec, "spec", False, request.candidates) as run,
                aclosing(run.events()) as events,
            ):
                async for event in events:
                    match event:
                        case Started():
                            _begin_response(response, event)
                        case Finished(output_index=index):
                            await scores.add(index, run.take_scored(index), run.tokenizer)
                        case Completed():
                            response.usage.CopyFrom(event.usage)
                            response.timings.CopyFrom(event.timings)
            response.scores.extend(scores.found)
            return response

    async def CancelGeneration(  # noqa: N802
        self, request: CancelGenerationRequest, context: Context
    ) -> CancelGenerationResponse:
        if not request.request_ids and not request.client_request_ids:
            raise InvalidRequest.at("request_ids", "is empty, and so is client_request_ids; give at least one id")
        wanted = set(request.request_ids), set(request.client_request_ids) - {""}  # the last: of those that have none
        return CancelGenerationResponse(cancelled_request_ids=self._requests.cancel(current_call().tenant, *wanted))

    async def _batch_item(
        self,
        index: int,
        spec: GenerateSpec,
        item: InFlight,
        slots: asyncio.Semaphore,
        results: "asyncio.Queue[BatchGenerateResponse]",
    ) -> None:
        """Run one item of a batch, a request with an id of its own. Its failure leaves the other items alone."""
        try:
            async with item.waiting():
                await slots.acquire()
        except Exception as error:
            await results.put(_failed_item(index, error, item.call))
            return
        try:
            await results.put(await self._item_result(index, spec, item))
        finally:
            slots.release()

    async def _item_result(self, index: int, spec: GenerateSpec, item: InFlight) -> BatchGenerateResponse:
        try:
            if index > 0:  # the first is counted: it is the call
                self._entrance.tenants.get(item.call.tenant).count_request()
            check_item(spec, f"specs[{index}]")
            return BatchGenerateResponse(index=index, response=await self._generate(item, spec, f"specs[{index}]"))
        except Exception as error:
            return _failed_item(index, error, item.call)

    async def _generate(self, known: InFlight, spec: GenerateSpec, path: str) -> GenerateResponse:
        response, size = GenerateResponse(), 0
        async with self._run(known, spec, path, streaming=False) as run, aclosing(run.events()) as events:
            async for event in events:
                size += event.ByteSize()
                if size > self._answer_bytes:
                    raise MessageTooLarge.answer(size, self._answer_bytes)
                _add_to_response(response, event)
                if isinstance(event, PromptLogprobs):  # all outputs are sent at once, so other tasks get a turn
                    await asyncio.sleep(0)
        return response

    @asynccontextmanager
    async def _run(
        self,
        known: InFlight,
        spec: GenerateSpec,
        path: str,
        streaming: bool,
        candidates: Sequence[Candidate] = (),
    ) -> AsyncIterator[Run]:
        """Take one request from its spec to its run. However the block ends, the engine then forgets the request.

        `candidates`: what is scored behind the prompt, instead of outputs.
        """
        call, named = known.call, f"{path}.model"
        tenant = self._entrance.tenants.get(call.tenant)
        call.labels = dict(spec.labels)
        if spec.HasField("client_request_id"):
            call.client_request_id = spec.client_request_id
        target = await self._entrance.target(call, tenant, spec.model, named)
        prepared = await self._preparation.prepared(spec, target, tenant, path, candidates)
        size, limit = prepared.size, prepared.params.time_limit_seconds
        async with self._entrance.entered(known, tenant, target, spec.adapter_policy, size, limit, named) as entered:
            check_generates(target, entered, named)
            client, gaps = target.model.client, self._token_gaps.of((target.model.name,))
            job = prepared.job(call, tenant, entered, streaming)
            run = Run(job, client, entered.successor, gaps, entered.start)
            async with self._entrance.working(known, run):
                yield run


def _failed_item(index: int, error: Exception, call: Call) -> BatchGenerateResponse:
    return BatchGenerateResponse(
        index=index, error=error_status(known_error(error, call, f"item {index} of a batch"), call)
    )


def _begin_response(response: GenerateResponse | ScoreResponse, started: Started) -> None:
    response.request_id = started.request_id
    response.client_request_id = started.client_request_id
    response.labels.update(started.labels)
    response.target.CopyFrom(started.target)


def _add_to_response(response: GenerateResponse, event: Event) -> None:
    match event:
        case Started():
            _begin_response(response, event)
            response.prompt_token_ids.extend(event.prompt_token_ids)
        case PromptLogprobs():
            response.prompt_logprobs.extend(event.logprobs)
        case Delta():
            output = _output(response, event.output_index)
            output.text += event.text
            output.token_ids.extend(event.token_ids)
            output.logprobs.extend(event.logprobs)
            output.reasoning += event.reasoning
            output.tool_calls.extend(event.tool_calls)
        case Finished():
            _output(response, event.output_index).finished.CopyFrom(event)
        case Completed():
            response.usage.CopyFrom(event.usage)
            response.timings.CopyFrom(event.timings)
            if event.HasField("seed"):
                response.seed = event.seed


def _output(response: GenerateResponse, index: int) -> GenerateOutput:
    while len(response.outputs) <= index:
        response.outputs.add()
    return response.outputs[index]
