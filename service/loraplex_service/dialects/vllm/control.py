"""vllm.Control: the server, its model and adapters, by the servicers of the contract."""

from loraplex.v1.adapters_pb2 import Adapter
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
from loraplex_service.dialects.backend import Backend, Context, fields_of_loads, lora_id
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
            parallelism=ParallelismInfo(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
            max_model_len=limits.max_model_len,
            kv_block_size=limits.block_size,
            total_kv_blocks=limits.total_blocks,
            max_running_requests=limits.max_num_seqs,
            max_batched_tokens=model.config.max_num_batched_tokens,
            max_loras=model.config.max_resident_adapters,
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
        return LoadLoraResponse(adapter=_lora(adapter))

    async def UnloadLora(self, request: UnloadLoraRequest, context: Context) -> UnloadLoraResponse:  # noqa: N802
        draft = Draft(names=[("name", "lora_name")])
        return UnloadLoraResponse(adapter=_lora(await self._backend.delete(draft, request.lora_name, context)))

    async def ListLoras(self, request: ListLorasRequest, context: Context) -> ListLorasResponse:  # noqa: N802
        found = self._backend.list_adapters(context)
        return ListLorasResponse(adapters=[_lora(each) async for each in found if each.state == Adapter.STATE_ACTIVE])

    async def GetKvEventSources(  # noqa: N802
        self, request: GetKvEventSourcesRequest, context: Context
    ) -> GetKvEventSourcesResponse:
        return GetKvEventSourcesResponse()


def _lora(adapter: Adapter) -> LoraAdapter:
    """An adapter by its full name."""
    return LoraAdapter(lora_id=lora_id(adapter.name), lora_name=adapter.name, source_path=adapter.source)
