"""vllm.grpc.engine.VllmEngine, as gateways speak with engines, by the servicers of the contract."""

import json
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict

from loraplex.v1.inference_pb2 import Completed, Delta, Finished, PromptLogprobs, Started, TokenLogprob, Usage
from loraplex.v1.inference_pb2 import FinishReason as Reason
from loraplex.v1.pooling_pb2 import EmbedRequest as OurEmbedRequest
from loraplex_service.call import current_call
from loraplex_service.dialect_stubs import vllm_engine_pb2_grpc
from loraplex_service.dialect_stubs.vllm_engine_pb2 import (
    AbortRequest,
    AbortResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateComplete,
    GenerateRequest,
    GenerateResponse,
    GenerateStreamChunk,
    GetLoadsRequest,
    GetLoadsResponse,
    GetModelInfoRequest,
    GetModelInfoResponse,
    GetServerInfoRequest,
    GetServerInfoResponse,
    HealthCheckRequest,
    HealthCheckResponse,
    InputLogProbs,
    InputTokenLogProb,
    OutputLogProbs,
    SchedulerLoad,
    TopLogProbs,
)
from loraplex_service.dialects.backend import Backend, Context
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.vllm.fields import ENGINE
from loraplex_service.errors import FeatureUnsupported
from loraplex_service.ports.receiving import check_message

ADAPTER = "loraplex-adapter"  # the metadata that names a model, an adapter or what else a request may name
CORE = "core"


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Answers in tokens. What generates, the metadata says where several models are served."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._start = time.monotonic()

    async def Generate(  # noqa: N802
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateResponse, None]:
        draft = Draft()
        ENGINE.read(request, draft)
        self._backend.choose(draft, _named(context), "", ADAPTER, "")
        draft.spec.output.text, draft.spec.output.token_ids = False, True
        answers = _Answers(request.stream)
        async with aclosing(self._backend.stream(draft, context, collected=not request.stream)) as events:
            async for event in events:
                for response in answers.of(getattr(event, event.WhichOneof("event") or "")):
                    yield response

    async def Embed(self, request: EmbedRequest, context: Context) -> EmbedResponse:  # noqa: N802
        draft = Draft(names=[("prompts[0].token_ids.ids", "tokenized.input_ids"), ("model", ADAPTER)])
        ours = OurEmbedRequest(model=_named(context) or f"models/{self._backend.only_model(ADAPTER).name}")
        ours.prompts.add().token_ids.ids.extend(request.tokenized.input_ids)
        ours.options.client_request_id = request.request_id
        with draft.naming():
            await check_message(ours)
            response = await self._backend.pooling.Embed(ours, context)
        embedding = response.embeddings[0]
        return EmbedResponse(
            embedding=embedding.values,
            prompt_tokens=embedding.prompt_tokens,
            embedding_dim=len(embedding.values),
        )

    async def HealthCheck(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:  # noqa: N802
        healthy = self._backend.is_serving()
        return HealthCheckResponse(healthy=healthy, message="" if healthy else "no request is let in now")

    async def Abort(self, request: AbortRequest, context: Context) -> AbortResponse:  # noqa: N802
        await self._backend.cancel(list(request.request_ids), context)
        return AbortResponse()

    # ---- the model and the server ------------------------------------------------------------------------------------

    async def GetModelInfo(self, request: GetModelInfoRequest, context: Context) -> GetModelInfoResponse:  # noqa: N802
        model = self._backend.host.serving(self._model(context))
        limits, length = model.limits, model.limits.max_model_len
        defaults = MessageToDict(model.default_sampling, preserving_proto_field_name=True)
        return GetModelInfoResponse(
            model_path=model.name,
            is_generation=limits.classifier is None,
            max_context_length=length,
            vocab_size=limits.vocab_size,
            served_model_name=model.name,
            architectures=[limits.architecture],
            eos_token_ids=sorted(model.tokenizer.eos_token_ids),
            max_req_input_len=length - 1,
            default_sampling_params_json=json.dumps(defaults),
        )

    async def GetServerInfo(  # noqa: N802
        self, request: GetServerInfoRequest, context: Context
    ) -> GetServerInfoResponse:
        model = self._backend.host.serving(self._model(context))
        stats = model.client.stats
        return GetServerInfoResponse(
            active_requests=0 if stats is None or not current_call().is_admin else stats.num_running,
            uptime_seconds=time.monotonic() - self._start,
            server_type="loraplex",
            data_parallel_size=1,
            block_size=model.limits.block_size,
            model_dtype=model.limits.dtype,
            max_num_seqs=model.limits.max_num_seqs,
        )

    async def GetLoads(self, request: GetLoadsRequest, context: Context) -> GetLoadsResponse:  # noqa: N802
        if request.dp_rank:
            raise FeatureUnsupported("dp_rank", "there is one rank, 0")
        if unknown := [part for part in request.include if part != CORE]:
            raise FeatureUnsupported("include", f"{unknown[0]!r} is not told; {CORE} is")
        loads = [self._load(self._model(context))]
        time_now = datetime.now(UTC).isoformat()
        return GetLoadsResponse(timestamp=time_now, version=self._backend.version, dp_rank_count=1, loads=loads)

    def _load(self, name: str) -> SchedulerLoad:
        model = self._backend.host.serving(name)
        stats, limits = model.client.stats, model.limits
        if stats is None:
            return SchedulerLoad(max_running_requests=limits.max_num_seqs)
        waiting, used = stats.num_not_running, stats.used_blocks
        looked_up = max(1, stats.prefix_cache_queries)
        return SchedulerLoad(
            num_running_reqs=stats.num_running,
            num_waiting_reqs=waiting,
            num_total_reqs=stats.num_running + waiting,
            num_used_tokens=used * stats.block_size,
            max_total_num_tokens=stats.total_blocks * stats.block_size,
            token_usage=used / max(1, stats.total_blocks),
            cache_hit_rate=stats.prefix_cache_hits / looked_up,
            max_running_requests=limits.max_num_seqs,
        )

    def _model(self, context: Context) -> str:
        """The bare name of the base model that the metadata means, or of the only one."""
        name = _named(context)
        return self._backend.target(name, ADAPTER).model.name if name else self._backend.only_model(ADAPTER).name


def _named(context: Context) -> str:
    return str(dict(context.invocation_metadata() or ()).get(ADAPTER, ""))


class _Answers:
    """Makes the responses of one request: what is new where it streams, and each output once it has ended."""

    def __init__(self, streams: bool) -> None:
        self._streams = streams
        self._usage = Usage()
        self._prompt: InputLogProbs | None = None
        self._outputs: dict[int, GenerateComplete] = {}
        self._ended: list[GenerateComplete] = []

    def of(self, event: object) -> Iterable[GenerateResponse]:
        """The responses for an event. What ended comes with the whole usage, at the end: one after the other is made,
        each with all that is told of the prompt."""
        match event:
            case Started():
                self._usage.prompt_tokens = event.prompt_tokens
                self._usage.cached_prompt_tokens = event.cached_prompt_tokens
            case PromptLogprobs():
                self._prompt = _add_prompt(self._prompt, event)
            case Delta():
                return self._delta(event)
            case Finished():
                self._finish(event)
            case Completed():
                self._usage.CopyFrom(event.usage)
                return (GenerateResponse(complete=self._complete(output)) for output in self._ended)
        return []

    def _delta(self, delta: Delta) -> list[GenerateResponse]:
        output = self._outputs.setdefault(delta.output_index, GenerateComplete(index=delta.output_index))
        output.output_ids.extend(delta.token_ids)
        logprobs = _logprobs(delta)
        if logprobs is not None:
            output.output_logprobs.MergeFrom(logprobs)
        if not self._streams:
            return []
        chunk = GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=len(output.output_ids),
            cached_tokens=self._usage.cached_prompt_tokens,
            output_logprobs=logprobs,
            input_logprobs=self._prompt,
            index=delta.output_index,
        )
        self._prompt = None
        return [GenerateResponse(chunk=chunk)]

    def _finish(self, finished: Finished) -> None:
        output = self._outputs.setdefault(finished.output_index, GenerateComplete(index=finished.output_index))
        is_stop = finished.reason in (Reason.FINISH_REASON_STOP, Reason.FINISH_REASON_EOS)
        output.finish_reason = "stop" if is_stop else "length"
        output.completion_tokens = finished.completion_tokens
        match finished.WhichOneof("matched"):
            case "stop":
                output.matched_stop_str = finished.stop
            case "stop_token_id":
                output.matched_token_id = finished.stop_token_id
        self._ended.append(output)

    def _complete(self, output: GenerateComplete) -> GenerateComplete:
        output.prompt_tokens = self._usage.prompt_tokens
        output.cached_tokens = self._usage.cached_prompt_tokens
        output.spec_draft_tokens = self._usage.draft_tokens
        output.spec_accepted_tokens = self._usage.accepted_draft_tokens
        if self._prompt is not None:
            output.input_logprobs.CopyFrom(self._prompt)
        return output


def _logprobs(delta: Delta) -> OutputLogProbs | None:
    if not delta.logprobs:
        return None
    return OutputLogProbs(
        token_logprobs=[token.logprob for token in delta.logprobs],
        token_ids=[token.token_id for token in delta.logprobs],
        top_logprobs=[_top(token) for token in delta.logprobs],
    )


def _top(token: TokenLogprob) -> TopLogProbs:
    return TopLogProbs(values=[top.logprob for top in token.top], token_ids=[top.token_id for top in token.top])


def _add_prompt(before: InputLogProbs | None, event: PromptLogprobs) -> InputLogProbs:
    found = before or InputLogProbs()
    for token in event.logprobs:
        value = InputTokenLogProb(value=token.logprob) if token.HasField("logprob") else InputTokenLogProb()
        found.token_logprobs.append(value)
        found.token_ids.append(token.token_id)
        found.top_logprobs.append(_top(token))
    return found
