"""openengine.v1.Control: the server, its models and adapters, by the servicers of the contract."""

import time

from loraplex_service.dialect_stubs import openengine_pb2_grpc
from loraplex_service.dialect_stubs.openengine_pb2 import (
    ABORT_STATUS_ABORTED,
    ABORT_STATUS_ALREADY_FINISHED,
    CANDIDATE_TOKEN_SELECTION_MODE_TOKEN_IDS,
    CANDIDATE_TOKEN_SELECTION_MODE_TOP_N,
    ENGINE_ROLE_AGGREGATED,
    ENGINE_ROLE_UNSPECIFIED,
    GUIDED_DECODING_MODE_CHOICE,
    GUIDED_DECODING_MODE_EBNF_GRAMMAR,
    GUIDED_DECODING_MODE_JSON_OBJECT,
    GUIDED_DECODING_MODE_JSON_SCHEMA,
    GUIDED_DECODING_MODE_REGEX,
    HEALTH_STATE_DRAINING,
    HEALTH_STATE_NOT_READY,
    HEALTH_STATE_READY,
    HEALTH_STATE_STARTING,
    AbortRequest,
    AbortResponse,
    DeploymentCapacity,
    GenerationCapabilities,
    GetKvEventSourcesRequest,
    GetKvEventSourcesResponse,
    GetLoadRequest,
    GetModelInfoRequest,
    GetServerInfoRequest,
    GuidedDecodingCapabilities,
    HealthCheck,
    HealthRequest,
    HealthResponse,
    HealthState,
    ListLorasRequest,
    ListLorasResponse,
    LoadInfo,
    LoadLoraRequest,
    LoadLoraResponse,
    LogprobCapabilities,
    LoraAdapter,
    ModelInfo,
    ParallelismInfo,
    ServerInfo,
    UnloadLoraRequest,
    UnloadLoraResponse,
)
from loraplex_service.dialects.backend import Backend, Context, capacity, fields_of_loads, lora, parallelism
from loraplex_service.dialects.fields import Draft
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.models.host import HostedModel
from loraplex_service.models.supervisor import EngineState
from loraplex_service.validation.limits import LIMITS, Range

NAME = "loraplex"
SCHEMA_REVISION = 1  # there is one so far
_FORMS = (
    GUIDED_DECODING_MODE_JSON_SCHEMA,
    GUIDED_DECODING_MODE_REGEX,
    GUIDED_DECODING_MODE_EBNF_GRAMMAR,
    GUIDED_DECODING_MODE_CHOICE,
    GUIDED_DECODING_MODE_JSON_OBJECT,
)
_STATES = {
    EngineState.ACTIVE: HEALTH_STATE_READY,
    EngineState.LOADING: HEALTH_STATE_STARTING,
    EngineState.RESTARTING: HEALTH_STATE_STARTING,
    EngineState.UNLOADING: HEALTH_STATE_DRAINING,
}


class OpenEngineControlServicer(openengine_pb2_grpc.ControlServicer):
    """Answers for all models where the definition has room for that, else for the one that is named or served."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetServerInfo(self, request: GetServerInfoRequest, context: Context) -> ServerInfo:  # noqa: N802
        models = self._backend.list_models()
        only = self._backend.only_model("model") if len(models) == 1 else None
        return ServerInfo(
            engine_name=NAME,
            engine_version=self._backend.version,
            engine_role=ENGINE_ROLE_AGGREGATED,
            instance_id=self._backend.instance,
            supported_models=[model.name for model in models],
            parallelism=None if only is None else ParallelismInfo(**parallelism(only)),
            schema_revision=SCHEMA_REVISION,
            minimum_client_revision=SCHEMA_REVISION,
            capacity=None if only is None else _capacity(only),
        )

    async def GetModelInfo(self, request: GetModelInfoRequest, context: Context) -> ModelInfo:  # noqa: N802
        name = request.model or f"models/{self._backend.only_model('model').name}"
        model = self._backend.target(name, "model").model
        return ModelInfo(
            model_id=f"models/{model.name}",
            served_model_name=model.name,
            max_context_length=model.limits.max_model_len,
            max_output_tokens=model.limits.max_model_len - 1,
            supports_text_input=True,
            supports_token_ids_input=True,
            generation=_capabilities(),
            supports_lora=True,
            supports_multimodal=False,
        )

    async def GetLoad(self, request: GetLoadRequest, context: Context) -> LoadInfo:  # noqa: N802
        """The one rank that there is has no list of its own."""
        if request.include_per_rank:
            raise FeatureUnsupported("include_per_rank", "there is one rank; leave it out")
        clients = [model.client for model in self._backend.host.all() if model.client is not None]
        stats = [client.stats for client in clients if client.stats is not None]
        return LoadInfo(
            instance_id=self._backend.instance,
            timestamp_unix_nanos=time.time_ns(),
            running_requests=sum(each.num_running for each in stats),
            queued_requests=sum(each.num_not_running for each in stats),
            used_kv_blocks=sum(each.used_blocks for each in stats),
            total_kv_blocks=sum(each.total_blocks for each in stats),
        )

    async def Health(self, request: HealthRequest, context: Context) -> HealthResponse:  # noqa: N802
        if request.include_inference_probe:
            raise FeatureUnsupported(
                "include_inference_probe", "engines say by themselves that they live; leave it out"
            )
        if request.role not in (ENGINE_ROLE_UNSPECIFIED, ENGINE_ROLE_AGGREGATED):
            raise InvalidRequest.at("role", "must be ENGINE_ROLE_AGGREGATED, the only one there is")
        names = {model.name for model in self._backend.host.all()}
        if request.model:
            names = {self._backend.target(request.model, "model").model.name}
        checks = [
            HealthCheck(name="model", state=_state_of(model.state), message=f"models/{model.name}")
            for model in self._backend.host.all()
            if model.name in names
        ]
        return HealthResponse(state=self._state(), checks=checks)

    def _state(self) -> HealthState.ValueType:
        if self._backend.is_serving():
            return HEALTH_STATE_READY
        states = {model.state for model in self._backend.host.all()}
        if EngineState.ACTIVE in states:
            return HEALTH_STATE_DRAINING
        is_starting = states & {EngineState.LOADING, EngineState.RESTARTING}
        return HEALTH_STATE_STARTING if is_starting else HEALTH_STATE_NOT_READY

    async def Abort(self, request: AbortRequest, context: Context) -> AbortResponse:  # noqa: N802
        if not request.request_id:
            raise InvalidRequest.at("request_id", "is required")
        ended = await self._backend.cancel([request.request_id], context)
        status = ABORT_STATUS_ABORTED if ended else ABORT_STATUS_ALREADY_FINISHED
        return AbortResponse(status=status, message=", ".join(ended))

    # ---- adapters ----------------------------------------------------------------------------------------------------

    async def LoadLora(self, request: LoadLoraRequest, context: Context) -> LoadLoraResponse:  # noqa: N802
        asked, draft = request.adapter, Draft(names=fields_of_loads("adapter.lora_name", "adapter.source_path"))
        if asked.lora_id:
            raise FeatureUnsupported("adapter.lora_id", "adapters have names; leave it out")
        there = {each.version async for each in self._backend.list_adapters(context, versions=True)}
        adapter = await self._backend.register(draft, asked.lora_name, asked.source_path, "", context)
        return LoadLoraResponse(adapter=LoraAdapter(**lora(adapter)), already_loaded=adapter.version in there)

    async def UnloadLora(self, request: UnloadLoraRequest, context: Context) -> UnloadLoraResponse:  # noqa: N802
        draft = Draft(names=[("name", "lora_name")])
        adapter = await self._backend.delete(draft, request.lora_name, context)
        return UnloadLoraResponse(adapter=LoraAdapter(**lora(adapter)))

    async def ListLoras(self, request: ListLorasRequest, context: Context) -> ListLorasResponse:  # noqa: N802
        active = self._backend.active_adapters(context)
        return ListLorasResponse(adapters=[LoraAdapter(**lora(each)) async for each in active])

    async def GetKvEventSources(  # noqa: N802
        self, request: GetKvEventSourcesRequest, context: Context
    ) -> GetKvEventSourcesResponse:
        if any(request.data_parallel_ranks):
            raise FeatureUnsupported("data_parallel_ranks", "there is one rank, 0")
        return GetKvEventSourcesResponse()


def _capacity(model: HostedModel) -> DeploymentCapacity:
    limits = model.supervisor.limits
    return DeploymentCapacity() if limits is None else DeploymentCapacity(**capacity(model, limits))


def _state_of(state: EngineState) -> HealthState.ValueType:
    return _STATES.get(state, HEALTH_STATE_NOT_READY)


def _capabilities() -> GenerationCapabilities:
    prompts = (CANDIDATE_TOKEN_SELECTION_MODE_TOP_N,)
    outputs = (*prompts, CANDIDATE_TOKEN_SELECTION_MODE_TOKEN_IDS)
    return GenerationCapabilities(
        prompt_logprobs=LogprobCapabilities(
            supported=True, candidate_selection_modes=prompts, max_top_n=_most("OutputOptions.prompt_logprobs")
        ),
        output_logprobs=LogprobCapabilities(
            supported=True, candidate_selection_modes=outputs, max_top_n=_most("OutputOptions.top_logprobs")
        ),
        guided_decoding=GuidedDecodingCapabilities(supported=True, modes=_FORMS),
        max_num_sequences=_most("Sampling.n"),
        supports_priority=True,
        supports_stop_in_output=True,
        supports_cache_salt=True,
        supports_prefix_cache_bypass=True,
    )


def _most(field: str) -> int:
    limit = LIMITS[field]
    assert isinstance(limit, Range)
    return int(limit.high)
