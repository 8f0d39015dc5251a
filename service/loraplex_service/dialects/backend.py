"""What all dialects call: the servicers of the contract, and what they are asked most."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypedDict

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo

from loraplex.operations.base import adapter_name, model_name, tenant_name
from loraplex.v1.adapters_pb2 import Adapter, CreateAdapterRequest, DeleteAdapterRequest, ListAdaptersRequest
from loraplex.v1.inference_pb2 import (
    CancelGenerationRequest,
    GenerateRequest,
    GenerateResponse,
    StreamGenerateRequest,
    StreamGenerateResponse,
)
from loraplex.v1.models_pb2 import Model
from loraplex_engine.link.messages import EngineLimits
from loraplex_service.admission.places import UnreadAnswers
from loraplex_service.admission.tenants import Tenants
from loraplex_service.call import current_call
from loraplex_service.control.adapters import AdapterServicer
from loraplex_service.control.models import ModelServicer, model_message
from loraplex_service.control.server import ServerServicer
from loraplex_service.dialects.fields import Draft
from loraplex_service.errors import FailedPrecondition, InvalidRequest, MessageTooLarge, Unavailable
from loraplex_service.models.host import HostedModel, ModelHost
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.target import Target
from loraplex_service.ports.receiving import check_message
from loraplex_service.requests.inference import InferenceServicer
from loraplex_service.requests.pooling import PoolingServicer

Context = grpc.aio.ServicerContext[Any, Any]

READ_SECONDS = 60  # for the files of an adapter to be read, and for a model to be loaded
_ADAPTERS = "/adapters/"


@dataclass(frozen=True, slots=True)
class Backend:
    """The servicers of the contract. Dialects call them within their own calls."""

    inference: InferenceServicer
    pooling: PoolingServicer
    adapters: AdapterServicer
    models: ModelServicer
    server: ServerServicer
    host: ModelHost
    catalog: Catalog
    tenants: Tenants
    version: str  # of the server
    instance: str  # of this life of the server
    is_serving: Callable[[], bool]  # whether a model serves, and requests are let in
    answer_bytes: int  # of an answer in one piece
    unread: UnreadAnswers  # of such answers, those in streams of them

    # ---- generations -------------------------------------------------------------------------------------------------

    async def stream(
        self, draft: Draft, context: Context, collected: bool = False
    ) -> AsyncGenerator[StreamGenerateResponse, None]:
        """Generate what the draft asks for. Errors name its fields.

        `collected`: the answer is sent in one piece. Raises MessageTooLarge once it is too large for that.
        """
        request, size = StreamGenerateRequest(spec=draft.spec), 0
        with draft.naming():
            await check_message(request)
            async with aclosing(self.inference.StreamGenerate(request, context)) as responses:
                async for response in responses:
                    size += response.ByteSize() if collected else 0
                    self.check_answer(size)
                    yield response

    def check_answer(self, size: int) -> None:
        """Raise MessageTooLarge for an answer in one piece that has more bytes than such answers may have."""
        if size > self.answer_bytes:
            raise MessageTooLarge.answer(size, self.answer_bytes)

    async def whole(self, draft: Draft, context: Context) -> GenerateResponse:
        """The same in one piece."""
        request = GenerateRequest(spec=draft.spec)
        with draft.naming():
            await check_message(request)
            return await self.inference.Generate(request, context)

    async def cancel(self, request_ids: list[str], context: Context) -> list[str]:
        """End the caller's generations with these ids, which their callers gave. Returns the server's ids of them."""
        request = CancelGenerationRequest(client_request_ids=request_ids)
        await check_message(request)
        return list((await self.inference.CancelGeneration(request, context)).cancelled_request_ids)

    # ---- names -------------------------------------------------------------------------------------------------------

    def target(self, name: str, path: str) -> Target:
        """What a name means to the caller. `path`: the field that holds it. Raises what `Catalog.resolve` does."""
        return self.catalog.resolve(current_call().tenant, name, path)

    def only_model(self, path: str) -> HostedModel:
        """The model that is served. `path`: the field that says which if there are several. Raises InvalidRequest."""
        models = self.host.all()
        if len(models) != 1:
            names = ", ".join(sorted(model.name for model in models))
            raise InvalidRequest.at(path, f"is required: several models are served, {names}")
        return models[0]

    def choose(self, draft: Draft, model: str, adapter: str, model_field: str, adapter_field: str) -> None:
        """Have the draft generate with a model, or with an adapter of it; with neither named, with the only model.

        The fields are those that hold the names. Raises InvalidRequest, and what names raise.
        """
        chosen = adapter or model or f"models/{self.only_model(model_field).name}"
        draft.spec.model = chosen
        draft.names.append(("model", adapter_field if adapter else model_field))
        if adapter and model:
            base = self.target(model, model_field).model.name
            if self.target(adapter, adapter_field).model.name != base:
                raise InvalidRequest.at(adapter_field, f"{adapter[:200]!r} is no adapter of {base}")

    # ---- models and adapters -----------------------------------------------------------------------------------------

    def list_models(self) -> list[Model]:
        return [model_message(model) for model in sorted(self.host.all(), key=lambda model: model.name)]

    async def list_adapters(self, context: Context, versions: bool = False) -> AsyncIterator[Adapter]:
        """The adapters that the caller sees, by their current versions or all."""
        request = ListAdaptersRequest(parent="tenants/-", page_size=1000, include_versions=versions)
        while True:
            response = await self.adapters.ListAdapters(request, context)
            for adapter in response.adapters:
                yield adapter
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token
            await asyncio.sleep(0)  # others get a turn

    async def active_adapters(self, context: Context) -> AsyncIterator[Adapter]:
        """Those of them that can be used, by their current versions."""
        async for adapter in self.list_adapters(context):
            if adapter.state == Adapter.STATE_ACTIVE:
                yield adapter

    async def register(self, draft: Draft, name: str, source: str, base_model: str, context: Context) -> Adapter:
        """Register an adapter, and return it once it can be used. Raises what says why it cannot."""
        parent, is_full, adapter_id = name.rpartition(_ADAPTERS)
        base = base_model or self.only_model(draft.named("adapter.base_model")).name
        request = CreateAdapterRequest(
            parent=parent if is_full else tenant_name(tenant_of_names(context)),
            adapter_id=adapter_id,
            adapter=Adapter(source=source, base_model=model_name(base)),
            wait=Duration(seconds=READ_SECONDS),
        )
        with draft.naming():
            await check_message(request)
            adapter = await self.adapters.CreateAdapter(request, context)
        if adapter.state == Adapter.STATE_FAILED:
            raise FailedPrecondition(_reason(adapter), adapter.error.message)
        if adapter.state != Adapter.STATE_ACTIVE:
            raise Unavailable("ADAPTER_COLD", f"{name} is not read after {READ_SECONDS} s; ask again")
        return adapter

    async def delete(self, draft: Draft, name: str, context: Context) -> Adapter:
        """Delete an adapter with its versions: new requests are refused, and running ones end in peace."""
        request = DeleteAdapterRequest(name=adapter_name(name, tenant_of_names(context)) if name else "")
        with draft.naming():
            await check_message(request)
            return await self.adapters.DeleteAdapter(request, context)


def fields_of_loads(name: str, source: str) -> list[tuple[str, str]]:
    """Which fields of a dialect say what an adapter to be registered is: its name, and its source."""
    return [("adapter_id", name), ("parent", name), ("adapter.source", source)]


# What several dialects tell by fields of the same names.


class LoraFields(TypedDict):
    """The fields of an adapter that dialects have in common, by the names that they give them."""

    lora_id: int
    lora_name: str
    source_path: str


class ParallelismFields(TypedDict):
    """Likewise of how a model is spread."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int


class CapacityFields(TypedDict):
    """Likewise of what an engine holds: tokens in a block, blocks, requests, tokens in a step, adapters."""

    kv_block_size: int
    total_kv_blocks: int
    max_running_requests: int
    max_batched_tokens: int
    max_loras: int


def lora(adapter: Adapter) -> LoraFields:
    """An adapter by its full name. It has no number of its own, and nothing here takes the one that it is told by."""
    number = 1 + zlib.crc32(adapter.name.encode())  # above 0, the same everywhere
    return {"lora_id": number, "lora_name": adapter.name, "source_path": adapter.source}


def parallelism(model: HostedModel) -> ParallelismFields:
    """How a model is spread."""
    return {
        "tensor_parallel_size": model.config.tensor_parallel,
        "pipeline_parallel_size": model.config.pipeline_parallel,
        "data_parallel_size": 1,
    }


def capacity(model: HostedModel, limits: EngineLimits) -> CapacityFields:
    """What a model's engine holds."""
    return {
        "kv_block_size": limits.block_size,
        "total_kv_blocks": limits.total_blocks,
        "max_running_requests": limits.max_num_seqs,
        "max_batched_tokens": model.config.max_num_batched_tokens,
        "max_loras": model.config.max_resident_adapters,
    }


def tenant_of_names(context: Context) -> str:
    """The tenant whose adapters bare names mean where they are loaded and unloaded, as over HTTP."""
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("loraplex-tenant", "shared"))


def _reason(adapter: Adapter) -> str:
    """Why a version failed, as ErrorInfo has it."""
    info = ErrorInfo()
    adapter.error.details[0].Unpack(info)
    return info.reason
