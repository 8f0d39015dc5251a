"""vllm.Control: the server, its model and adapters, by the servicers of the contract."""

from loraplex_service.dialect_stubs import vllm_pb2_grpc
from loraplex_service.dialect_stubs.vllm_pb2 import (
    AbortRequest,
    AbortResponse,
    GetKvEventSourcesRequest,
    GetKvEventSourcesResponse,
    GetModelInfoRequest,
    GetServerInfoRequest,
    ListLorasRequest,
    ListLorasResponse,
    LoadLoraRequest,
    LoadLoraResponse,
    LoraAdapter,
    ModelInfo,
    ParallelismInfo,
    ServerInfo,
    UnloadLoraRequest,
    UnloadLoraResponse,
)
from loraplex_service.dialects.backend import Backend, Context, capacity, fields_of_loads, lora, parallelism
from loraplex_service.dialects.fields import Draft


class VllmControlServicer(vllm_pb2_grpc.ControlServicer):
    """Answers for the one model that is served; where there are several, it says so."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetServerInfo(self, request: GetServerInfoRequest, context: Context) -> ServerInfo:  # noqa: N802
        model = self._backend.only_model("server")
        limits = self._backend.host.serving(model.name).limits
        return ServerInfo(
            engine_version=self._backend.version,
            api_version="loraplex.v1",
            instance_id=self._backend.instance,
            parallelism=ParallelismInfo(**parallelism(model)),
            max_model_len=limits.max_model_len,
            **capacity(model, limits),
        )

    async def GetModelInfo(self, request: GetModelInfoRequest, context: Context) -> ModelInfo:  # noqa: N802
        name = self._backend.only_model("model").name
        return ModelInfo(
            model_id=f"models/{name}",
            served_model_name=name,
            supports_text_input=True,
            supports_token_ids_input=True,
            supports_lora=True,
        )

    async def Abort(self, request: AbortRequest, context: Context) -> AbortResponse:  # noqa: N802
        await self._backend.cancel(list(request.request_ids), context)
        return AbortResponse()

    async def LoadLora(self, request: LoadLoraRequest, context: Context) -> LoadLoraResponse:  # noqa: N802
        draft = Draft(names=fields_of_loads("lora_name", "source_path"))
        adapter = await self._backend.register(draft, request.lora_name, request.source_path, "", context)
        return LoadLoraResponse(adapter=LoraAdapter(**lora(adapter)))

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
        return GetKvEventSourcesResponse()
