"""ModelService: base models, in and out of memory."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc.aio

from loraplex.v1 import models_pb2_grpc
from loraplex.v1.models_pb2 import (
    MODEL_CAPABILITY_ADAPTERS,
    MODEL_CAPABILITY_BEAM_SEARCH,
    MODEL_CAPABILITY_CHAT,
    MODEL_CAPABILITY_CLASSIFY,
    MODEL_CAPABILITY_CONSTRAINT,
    MODEL_CAPABILITY_DRAFTS,
    MODEL_CAPABILITY_EMBED,
    MODEL_CAPABILITY_LOGPROBS,
    MODEL_CAPABILITY_PREFIX_CACHE,
    MODEL_CAPABILITY_PROMPT_LOGPROBS,
    MODEL_CAPABILITY_REASONING,
    MODEL_CAPABILITY_RERANK,
    MODEL_CAPABILITY_TOOLS,
    GetModelRequest,
    ListModelsRequest,
    ListModelsResponse,
    LoadModelRequest,
    Model,
    ModelCapability,
    ModelLimits,
    UnloadModelRequest,
    WatchModelsRequest,
    WatchModelsResponse,
)
from loraplex.v1.watch_pb2 import (
    WATCH_EVENT_TYPE_CHANGED,
    WATCH_EVENT_TYPE_EXISTING,
    WATCH_EVENT_TYPE_SNAPSHOT_END,
)
from loraplex_service.control.once import Once
from loraplex_service.control.paging import page
from loraplex_service.control.sight import seen_model
from loraplex_service.control.waiting import wait_seconds
from loraplex_service.errors import FailedPrecondition, to_status
from loraplex_service.latest import Latest
from loraplex_service.models.host import HostedModel, ModelHost
from loraplex_service.models.supervisor import EngineState
from loraplex_service.names.grammar import model_id
from loraplex_service.text import Tokenizer
from loraplex_service.timestamps import duration_seconds, timestamp

Context = grpc.aio.ServicerContext[Any, Any]

STATES = {
    EngineState.UNLOADED: Model.STATE_UNLOADED,
    EngineState.LOADING: Model.STATE_LOADING,
    EngineState.ACTIVE: Model.STATE_ACTIVE,
    EngineState.UNLOADING: Model.STATE_UNLOADING,
    EngineState.RESTARTING: Model.STATE_LOADING,
    EngineState.FAILED: Model.STATE_FAILED,
}
OF_EVERY_MODEL = (
    MODEL_CAPABILITY_ADAPTERS,
    MODEL_CAPABILITY_EMBED,
    MODEL_CAPABILITY_CLASSIFY,
    MODEL_CAPABILITY_RERANK,
)
OF_LANGUAGE_MODELS = (
    MODEL_CAPABILITY_LOGPROBS,
    MODEL_CAPABILITY_PROMPT_LOGPROBS,
    MODEL_CAPABILITY_CONSTRAINT,
    MODEL_CAPABILITY_BEAM_SEARCH,
)
IMPLEMENTATIONS = {"native": Model.IMPLEMENTATION_NATIVE, "transformers": Model.IMPLEMENTATION_TRANSFORMERS}


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """Serves the host's models as resources."""

    def __init__(self, host: ModelHost, unload_grace_seconds: float) -> None:
        self._host = host
        self._unload_grace_seconds = unload_grace_seconds
        self._once = Once()

    async def GetModel(self, request: GetModelRequest, context: Context) -> Model:  # noqa: N802
        return model_message(self._host.get(model_id(request.name, "name")))

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:  # noqa: N802
        models, token = page(self._host.all(), lambda model: f"models/{model.name}", model_message, request)
        return ListModelsResponse(models=models, next_page_token=token)

    async def LoadModel(self, request: LoadModelRequest, context: Context) -> Model:  # noqa: N802
        model = self._host.get(model_id(request.name, "name"))
        seconds = wait_seconds(request)

        async def load() -> Model:
            model.load()
            await _settle(model, seconds)
            return model_message(model)

        return await self._once.run("LoadModel", request.request_id, load)

    async def UnloadModel(self, request: UnloadModelRequest, context: Context) -> Model:  # noqa: N802
        model = self._host.get(model_id(request.name, "name"))
        seconds = wait_seconds(request)
        grace = duration_seconds(request.grace) if request.HasField("grace") else self._unload_grace_seconds

        async def unload() -> Model:
            model.unload(grace)
            await _settle(model, seconds)
            return model_message(model)

        return await self._once.run("UnloadModel", request.request_id, unload)

    async def WatchModels(  # noqa: N802
        self, request: WatchModelsRequest, context: Context
    ) -> AsyncGenerator[WatchModelsResponse, None]:
        watched = self._host.all()
        if request.HasField("name"):
            watched = [self._host.get(model_id(request.name, "name"))]
        changes = Latest[HostedModel]()
        unsubscribe = self._host.subscribe(lambda model: changes.put(model.name, model))
        try:
            for model in watched:
                yield WatchModelsResponse(type=WATCH_EVENT_TYPE_EXISTING, model=model_message(model))
            yield WatchModelsResponse(type=WATCH_EVENT_TYPE_SNAPSHOT_END)
            async for model in changes:
                if model in watched:
                    yield WatchModelsResponse(type=WATCH_EVENT_TYPE_CHANGED, model=model_message(model))
        finally:
            unsubscribe()


async def _settle(model: HostedModel, seconds: float) -> None:
    settled = asyncio.create_task(model.wait_settled())
    await asyncio.wait({settled}, timeout=seconds)
    settled.cancel()


def model_message(model: HostedModel) -> Model:
    """The model as a resource, without what the present caller may not see."""
    supervisor, state = model.supervisor, model.state
    message = Model(
        name=f"models/{model.name}",
        source=model.config.model,
        revision=model.revision,
        state=STATES[state],
        default_sampling=model.default_sampling,
        labels=model.config.labels,
        etag=str(model.num_changes),
    )
    if state is EngineState.FAILED:
        error = FailedPrecondition("MODEL_UNLOADED", f"model {model.name!r} could not be loaded: {model.error}")
        message.error.CopyFrom(to_status(error, ""))
    if state in (EngineState.LOADING, EngineState.RESTARTING):
        message.bytes_loaded = supervisor.progress.bytes_loaded
        message.bytes_total = supervisor.progress.bytes_total
    if supervisor.load_time is not None:
        message.load_time.CopyFrom(timestamp(supervisor.load_time))
    _add_what_is_loaded(message, model)
    return seen_model(message)


def _add_what_is_loaded(message: Model, model: HostedModel) -> None:
    limits, client = model.supervisor.limits, model.client
    if limits is None:
        return
    message.architecture = limits.architecture
    message.dtype = limits.dtype
    message.quantization = limits.quantization
    message.implementation = IMPLEMENTATIONS[limits.implementation]
    message.limits.CopyFrom(
        ModelLimits(
            max_context_tokens=limits.max_model_len,
            max_output_tokens=limits.max_model_len - 1,
            max_adapter_rank=limits.max_adapter_rank,
            max_adapter_bytes=model.config.adapter_device_bytes,
            max_running_requests=limits.max_num_seqs,
        )
    )
    message.capabilities.extend(OF_EVERY_MODEL)
    if limits.classifier is None:
        message.capabilities.extend(OF_LANGUAGE_MODELS)
        message.capabilities.extend(_of_chats(model.tokenizer))
    if model.config.enable_prefix_caching:
        message.capabilities.append(MODEL_CAPABILITY_PREFIX_CACHE)
    if limits.drafts.most:
        message.capabilities.append(MODEL_CAPABILITY_DRAFTS)
    if client is not None:
        message.device = limits.device.name
        message.memory_bytes = limits.weight_bytes + limits.kv_cache_bytes
        if client.stats is not None:
            message.running_requests = client.stats.num_running
            message.waiting_requests = client.stats.num_not_running


def _of_chats(tokenizer: Tokenizer | None) -> Iterator[ModelCapability.ValueType]:
    """What a language model with a chat template does."""
    if tokenizer is None or tokenizer.chat_template is None:
        return
    yield MODEL_CAPABILITY_CHAT
    syntax = tokenizer.message_syntax
    if syntax is not None and syntax.has_calls and tokenizer.chat_template.shows_tools:
        yield MODEL_CAPABILITY_TOOLS
    if syntax is not None and syntax.has_reasoning:
        yield MODEL_CAPABILITY_REASONING
