"""The data plane as callers see it: the real gRPC server and stubs, in front of a fake engine."""

import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
import msgspec
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from loraplex.v1.generation_pb2 import GenerateSpec, Sampling
from loraplex.v1.inference_pb2 import (
    GenerateRequest,
    GenerateResponse,
    PartialUsage,
    StreamGenerateRequest,
    StreamGenerateResponse,
    Usage,
)
from loraplex.v1.inference_pb2_grpc import InferenceServiceStub, add_InferenceServiceServicer_to_server
from loraplex.v1.pooling_pb2_grpc import PoolingServiceStub, add_PoolingServiceServicer_to_server
from loraplex.v1.prompt_pb2 import Prompt
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import AdapterInfo, AdapterSpec, AdapterVersion
from loraplex_engine.link.client import EngineClient
from loraplex_service.admission.admission import Admission, AdmissionLimits
from loraplex_service.admission.tenants import Tenants
from loraplex_service.auth.door import Door
from loraplex_service.errors import LoraplexError, NotFound
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.routing import RouteBook
from loraplex_service.names.target import LoadedModel
from loraplex_service.ports.interceptors import CallInterceptor, CallLimits
from loraplex_service.ports.listeners import ConnectionLimits, Health, Service, build_server
from loraplex_service.requests.entrance import Entrance
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.inference import InferenceServicer
from loraplex_service.requests.pooling import PoolingServicer
from loraplex_service.requests.prompts import TextWork
from loraplex_service.state import StateFile
from loraplex_service.telemetry.logs import CallersThatLeft
from loraplex_service.text import TemplateRenderer, Tokenizer
from tests.own_log import is_of_closed_loop
from tests.service.fake_engine import FakeEngine

if TYPE_CHECKING:
    from loraplex.v1.inference_pb2_grpc import InferenceServiceAsyncStub  # types alone
    from loraplex.v1.pooling_pb2_grpc import PoolingServiceAsyncStub

BOS, EOS = 256, 257

DetailT = TypeVar("DetailT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class FakeModels:
    """Hosts "demo"; `problems` says what else a name leads to."""

    def __init__(self, model: LoadedModel) -> None:
        self.models = {"demo": model}
        self.problems: dict[str, LoraplexError] = {}

    def serving(self, name: str) -> LoadedModel:
        if name in self.problems:
            raise self.problems[name]
        if name not in self.models:
            raise NotFound("MODEL_NOT_FOUND", f"models/{name}", f"there is no model {name!r}")
        return self.models[name]

    async def successor(self, name: str, revision: str) -> EngineClient:
        return self.serving(name).client


def make_spec(text: str = "abc", **fields: Any) -> GenerateSpec:
    """A valid spec, but for what `fields` change; messages may be given as dicts."""
    values: dict[str, Any] = {"model": "demo", "prompt": Prompt(text=text), "stopping": {"max_tokens": 5}} | fields
    return GenerateSpec(**values)


def text_of(events: Sequence[StreamGenerateResponse], output_index: int = 0) -> str:
    return "".join(event.delta.text for event in events if event.delta.output_index == output_index)


@dataclass
class Failure:
    """A call's status, decoded."""

    code: grpc.StatusCode
    message: str
    status: Status
    metadata: dict[str, str | bytes]

    @property
    def reason(self) -> str:
        """Of ErrorInfo, which every error has, with our domain."""
        info = self.detail(error_details_pb2.ErrorInfo())
        assert info.domain == "loraplex"
        return str(info.reason)

    def detail(self, kind: DetailT) -> DetailT:
        """The detail of this kind, of which there must be one."""
        [packed] = [detail for detail in self.status.details if detail.TypeName() == kind.DESCRIPTOR.full_name]
        packed.Unpack(kind)
        return kind

    def has_detail(self, kind: type[Message]) -> bool:
        return any(detail.TypeName() == kind.DESCRIPTOR.full_name for detail in self.status.details)

    @property
    def partial_usage(self) -> Usage:
        partial = self.detail(PartialUsage())
        assert partial.request_id == self.metadata["loraplex-request-id"]
        return partial.usage

    @property
    def fields(self) -> list[str]:
        """Paths of the fields at fault."""
        return [violation.field for violation in self.detail(error_details_pb2.BadRequest()).field_violations]


async def failure(call: Awaitable[Any]) -> Failure:
    """The status with which a call fails, as it must."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return failure_of(raised.value)


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    metadata = dict(error.trailing_metadata() or ())
    status = Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    return Failure(error.code(), error.details() or "", status, metadata)


async def next_of(call: AsyncIterable[ResponseT]) -> ResponseT:
    """The next response of a stream, which there must be."""
    return await anext(aiter(call))


@dataclass
class DataPlane:
    """A running server, and what is behind it."""

    engine: FakeEngine
    models: FakeModels
    registry: AdapterRegistry
    admission: Admission
    entrance: Entrance
    servicer: InferenceServicer
    health: Health
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel
    stub: "InferenceServiceAsyncStub"
    pooling: "PoolingServiceAsyncStub"
    errors: "ErrorLog"

    def endless(self) -> None:
        """Make the model's context so long that no generation ends by itself."""
        limits = msgspec.structs.replace(self.engine.limits, max_model_len=1 << 30, total_blocks=1 << 30)
        self.models.models["demo"] = replace(self.models.models["demo"], limits=limits)

    async def stream(self, spec: GenerateSpec, **call: Any) -> list[StreamGenerateResponse]:
        request = StreamGenerateRequest(spec=spec)
        return [response async for response in self.stub.StreamGenerate(request, **call)]

    async def generate(self, spec: GenerateSpec, **call: Any) -> GenerateResponse:
        return await self.stub.Generate(GenerateRequest(spec=spec), **call)

    def add_adapter(self, name: str = "default/pirate", digest: str = "ab" * 32, active: bool = True) -> AdapterVersion:
        tenant, adapter_id = name.split("/")
        version = self.registry.register(tenant, adapter_id, digest, AdapterSpec("demo", f"/adapters/{name}"))
        if active:
            self.registry.activate(version.key, AdapterInfo(rank=8, size_bytes=1024, target_modules=("q_proj",)))
        return version


class ErrorLog(logging.Handler):
    """What the server logs as an error: a test that provokes one says so by clearing it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.addFilter(CallersThatLeft())
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not is_of_closed_loop(record):
            self.records.append(record)


@asynccontextmanager
async def data_plane(
    tokenizer: Tokenizer,
    admission_limits: AdmissionLimits | None = None,
    limits: CallLimits | None = None,
    max_pending_tokens: int | None = None,
    tenants: Tenants | None = None,
    door: Door | None = None,
    connections: ConnectionLimits | None = None,
) -> AsyncIterator[DataPlane]:
    engine = FakeEngine()
    tenants = tenants or Tenants()
    if max_pending_tokens is not None:
        engine.client.requests._max_pending_tokens = max_pending_tokens
    model = LoadedModel("demo", "r1", engine.limits, engine.client, tokenizer, Sampling())
    hosted, registry, admission = FakeModels(model), AdapterRegistry(), Admission(admission_limits or AdmissionLimits())
    async with TemplateRenderer() as renderer:
        catalog = Catalog(hosted, registry, RouteBook(StateFile(None)))
        entrance = Entrance(catalog, admission, tenants, lambda version: version.spec.source)
        answer_bytes = (limits or CallLimits()).answer_bytes
        texts = TextWork.of(renderer)
        servicer = InferenceServicer(entrance, texts, Forms(texts), answer_bytes=answer_bytes)
        name = "loraplex.v1.InferenceService"
        health = Health([name])
        pooling = PoolingServicer(entrance, texts, answer_bytes)
        services = [
            Service(name, servicer, add_InferenceServiceServicer_to_server),
            Service("loraplex.v1.PoolingService", pooling, add_PoolingServiceServicer_to_server),
        ]
        interceptor = CallInterceptor(door, limits, tenants=tenants)
        server, port = build_server(services, health, interceptor, "127.0.0.1:0", limits=connections)
        await health.start()
        await health.set_model("demo", True)
        await server.start()
        address = f"127.0.0.1:{port}"
        errors = ErrorLog()
        logging.getLogger().addHandler(errors)
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                stub, pooling_stub = InferenceServiceStub(channel), PoolingServiceStub(channel)
                yield DataPlane(
                    engine,
                    hosted,
                    registry,
                    admission,
                    entrance,
                    servicer,
                    health,
                    server,
                    address,
                    channel,
                    stub,
                    pooling_stub,
                    errors,
                )
        finally:
            await server.stop(None)
            await engine.close()
            logging.getLogger().removeHandler(errors)
        assert not errors.records, [record.getMessage() for record in errors.records]
