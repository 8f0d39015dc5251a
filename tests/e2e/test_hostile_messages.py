"""Whatever a message says, in whatever field of whatever method: an answer, and the same processes afterwards."""

import os
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from loraplex import AsyncClient
from loraplex.v1 import adapters_pb2, inference_pb2, models_pb2, pooling_pb2, routes_pb2, server_pb2, tokenizer_pb2
from tests.e2e.conftest import Server
from tests.service.requests.test_spec_fuzz import message_of

DATA = (inference_pb2, pooling_pb2, tokenizer_pb2)
ADMIN = (adapters_pb2, models_pb2, routes_pb2, server_pb2)
METHODS: list[tuple[MethodDescriptor, bool]] = [
    (method, module in DATA)
    for module in (*DATA, *ADMIN)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
OURS = {"INTERNAL", "UNKNOWN", "DATA_LOSS"}  # codes that blame the server
VALID_SPEC = {"model": "storyteller", "prompt": {"text": "A fox"}, "stopping": {"max_tokens": 3}}
SECONDS = 3.0  # some calls wait for what never comes: then their deadline ends them


async def outcome(server: Server, method: MethodDescriptor, on_data: bool, request: bytes) -> str:
    """The name of the code with which a call ends, or OK after its first response."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    async with grpc.aio.insecure_channel(server.data if on_data else server.admin) as channel:
        kinds = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
        }
        start: Any = kinds[method.client_streaming, method.server_streaming](path)
        call = start(iter([request]) if method.client_streaming else request, timeout=SECONDS)
        try:
            await (call.read() if method.server_streaming else call)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        call.cancel()
    return "OK"


@given(data=st.data(), target=st.sampled_from(METHODS))
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_message_of_any_method_is_answered_by_the_same_processes(
    server: Server, client: AsyncClient, data: st.DataObject, target: tuple[MethodDescriptor, bool]
) -> None:
    method, on_data = target
    engines = server.engine_pids()
    message = GetMessageClass(method.input_type)()
    if on_data and data.draw(st.booleans()):
        _make_valid(message)
    message.MergeFrom(data.draw(message_of(method.input_type)))
    code = await outcome(server, method, on_data, message.SerializeToString())
    event(f"{method.name} {code}")
    assert code not in OURS
    check_alive(server, engines)


@given(data=st.binary(min_size=1, max_size=64), target=st.sampled_from(METHODS))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
async def test_bytes_that_are_no_message_are_the_callers_mistake(
    server: Server, client: AsyncClient, data: bytes, target: tuple[MethodDescriptor, bool]
) -> None:
    engines = server.engine_pids()
    code = await outcome(server, *target, b"\xff" + data)
    assert code == "INVALID_ARGUMENT"
    check_alive(server, engines)


def check_alive(server: Server, engines: set[int]) -> None:
    os.kill(server.process.pid, 0)
    assert server.process.poll() is None
    assert server.engine_pids() == engines


def _make_valid(message: Message) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    if "spec" in fields:
        message.spec.MergeFrom(type(message.spec)(**VALID_SPEC))  # type: ignore[attr-defined]
    if "specs" in fields:
        message.specs.add().MergeFrom(type(message.specs.add())(**VALID_SPEC))  # type: ignore[attr-defined]
    if "prompts" in fields:
        message.prompts.add().text = "A fox"  # type: ignore[attr-defined]
    if "model" in fields:
        message.model = "storyteller"  # type: ignore[attr-defined]
