"""InferenceService: validate, resolve, tokenise, admit, run."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc.aio
import msgspec

from loraplex.v1 import inference_pb2_grpc
from loraplex.v1.generation_pb2 import Constraint, GenerateSpec
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
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.drafts import NO_DRAFTS, Drafts
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.admission.tenants import Tenant
from loraplex_service.call import Call, current_call
from loraplex_service.call_errors import error_status, known_error
from loraplex_service.errors import InvalidRequest, MessageTooLarge
from loraplex_service.names.target import Target, merged_sampling
from loraplex_service.requests.cold_adapters import Wait
from loraplex_service.requests.drafts import wanted_drafts
from loraplex_service.requests.entrance import Entered, Entrance, Size
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.heads import check_generates
from loraplex_service.requests.in_flight import InFlight
from loraplex_service.requests.messages import Messages
from loraplex_service.requests.output_form import OutputForm
from loraplex_service.requests.prompts import TextWork, prompt_tokens
from loraplex_service.requests.ranking import num_ranked, ranking_params, wanted_beams
from loraplex_service.requests.run import Event, Job, Run
from loraplex_service.requests.sampling import derived_seed, sampling_params
from loraplex_service.requests.scores import (
    CandidateScores,
    candidate_tokens,
    check_size,
    scoring_sequences,
    scoring_spec,
)
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.validation.checks import check_item, requires_calls

Context = grpc.aio.ServicerContext[Any, Any]

BATCH_CONCURRENCY = 16  # items at once, by default: more would only wait in a shared queue
SEED_BITS = 53  # bits of a drawn seed: as many as a JavaScript number holds

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
        self._texts = texts
        self._forms = forms
        self._messages = Messages(texts)
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
        call = known.call
        tenant = self._entrance.tenants.get(call.tenant)
        call.labels = dict(spec.labels)
        if spec.HasField("client_request_id"):
            call.client_request_id = spec.client_request_id
        target = await self._entrance.target(call, tenant, spec.model, f"{path}.model")
        model = target.model
        prompt = await prompt_tokens(spec.prompt, model, self._texts, tenant, f"{path}.prompt")
        room = model.limits.max_model_len - len(prompt)
        scored = await candidate_tokens(candidates, room, model, self._texts, tenant)
        check_size(scored, spec.output, self._answer_bytes)
        calls = "" if scored else await self._messages.required_calls(self._forms, spec, model, prompt, tenant, path)
        constraint, named_by = (Constraint(), "") if calls else _constraint(spec, target)
        where = f"{path}.model" if named_by else f"{path}.constraint"
        grammar = calls or await self._forms.grammar(constraint, tenant, where)
        if grammar and not calls:
            grammar = await self._messages.behind_reasoning(grammar, spec, model, prompt, tenant, path)
        sampling = merged_sampling(spec.sampling, target.default_sampling)
        seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(SEED_BITS)
        tokenizer = model.tokenizer
        params = sampling_params(
            spec, sampling, model.limits, tokenizer.eos_token_ids, tokenizer.num_token_ids, len(prompt), seed, path
        )
        drafts = wanted_drafts(spec, model.limits, path)
        if spec.HasField("beam_search") and grammar:
            problem = "excludes a form, which the route or the adapter names; set constraint.any_text to have none"
            raise InvalidRequest.at(f"{path}.beam_search", problem)
        params, search = ranking_params(params, spec, sampling, model.limits, path), spec.beam_search
        outputs = len(scored) or (sampling.n or 1 if search.num_beams else max(sampling.best_of, sampling.n, 1))
        num_read, limit = len(prompt) + sum(map(len, scored)), params.time_limit_seconds
        size = Size(num_read, search.num_beams or outputs, params.max_tokens)
        messages = None if scored else await self._messages.of(spec, outputs, tokenizer, prompt, tenant, path)
        policy, named = spec.adapter_policy, f"{path}.model"
        async with self._entrance.entered(known, tenant, target, policy, size, limit, named) as entered:
            check_generates(target, entered, named)
            resolved = entered.target
            resolved.constraint_source = named_by
            sequences = _sequences(tenant, spec, model.client, prompt, params, entered, outputs, grammar, drafts)
            if scored:
                sequences = scoring_sequences(sequences[0], scored, model.client)
            job = Job(
                request_id=call.request_id,
                client_request_id=call.client_request_id,
                labels=call.labels,
                operation="score" if scored else "chat" if spec.prompt.HasField("chat") else "text_completion",
                target=resolved,
                constraint="tool_calls" if calls else (constraint.WhichOneof("kind") or "") if grammar else "",
                tokenizer=model.tokenizer,
                form=OutputForm.of(spec, streaming, params.max_tokens),
                prompt=prompt,
                sequences=sequences,
                arrival=call.arrival,
                adapter_load_seconds=entered.wait.seconds,
                num_ranked=None if scored else num_ranked(sampling, search),
                form_path=_form_path(spec, path),
                messages=messages,
            )
            run = Run(job, model.client, entered.successor, self._token_gaps.of((model.name,)), entered.start)
            async with self._entrance.working(known, run):
                yield run


def _constraint(spec: GenerateSpec, target: Target) -> tuple[Constraint, str]:
    """The constraint of a request, and who names it by default; "": the request itself, or nobody."""
    return (spec.constraint, "") if spec.HasField("constraint") else target.default_constraint


def _form_path(spec: GenerateSpec, path: str) -> str:
    """Where a request says what form its outputs have; the name of a route or model, if theirs is the default."""
    if requires_calls(spec.prompt.chat):
        return f"{path}.prompt.chat.tools"
    if spec.HasField("constraint"):
        return f"{path}.constraint"
    return f"{path}.sampling.bad_words" if spec.sampling.bad_words else f"{path}.model"


def _after(params: SamplingParams, wait: Wait) -> SamplingParams:
    """The parameters of a request that has waited: its time limit is shorter by the wait."""
    if params.time_limit_seconds is None:
        return params
    return msgspec.structs.replace(params, time_limit_seconds=max(params.time_limit_seconds - wait.seconds, 0.0))


def _sequences(
    tenant: Tenant,
    spec: GenerateSpec,
    client: EngineClient,
    prompt: list[int],
    params: SamplingParams,
    entered: Entered,
    outputs: int,
    grammar: str,
    drafts: Drafts,
) -> list[AddRequest]:
    """One request to the engine for each output. Only the first one asks for the prompt's log-probabilities."""
    params = _after(params, entered.wait)
    first = AddRequest(
        request_id=client.requests.new_id(),
        prompt=prompt,
        sampling=params,
        adapter=entered.adapter,
        cache_salt=tenant.cache_salt(spec.cache.salt),
        bypass_prefix_cache=spec.cache.bypass_prefix_cache,
        priority=-tenant.priority(spec.priority),  # higher is first for callers, lower is first for engines
        tenant=tenant.name,
        weight=tenant.config.weight,
        adapter_wait_seconds=entered.wait.seconds_left,
        grammar=grammar,
        drafts=NO_DRAFTS if spec.HasField("beam_search") else drafts,
        beams=wanted_beams(spec.beam_search),
    )
    sequences = [first]
    for index in range(1, outputs):
        seed = derived_seed(params.seed, index)
        sampling = msgspec.structs.replace(params, seed=seed, num_prompt_logprobs=None)
        sequences.append(msgspec.structs.replace(first, request_id=client.requests.new_id(), sampling=sampling))
    return sequences


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
