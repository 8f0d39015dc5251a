"""However a call ends before its generation does, the engine forgets it, and its blocks are free."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from loraplex.v1.inference_pb2 import CancelGenerationRequest, GenerateRequest, StreamGenerateRequest
from loraplex.v1.inference_pb2_grpc import InferenceServiceStub
from loraplex_service.ports.interceptors import CallLimits
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec, next_of

LONG = {"max_tokens": 100}


@pytest.fixture
async def own_channel(plane: DataPlane) -> AsyncIterator[grpc.aio.Channel]:
    """A channel that the test may close."""
    async with grpc.aio.insecure_channel(plane.address) as channel:
        yield channel


def start(channel: grpc.aio.Channel, method: str, timeout: float | None = None) -> Any:
    stub = InferenceServiceStub(channel)
    if method == "unary":
        return stub.Generate(GenerateRequest(spec=make_spec(stopping=LONG)), timeout=timeout)
    return stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(stopping=LONG)), timeout=timeout)


async def reach(plane: DataPlane, state: str) -> None:
    """Wait until the request is in this state in the engine, which then stands still."""
    await plane.engine.until(lambda: len(plane.engine.requests) == 1)
    if state == "decode":
        plane.engine.allow_steps(3)
        await plane.engine.until(lambda: plane.engine.steps_allowed == 0)


async def end_of(call: Any, method: str) -> grpc.StatusCode:
    try:
        if method == "unary":
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK


@pytest.mark.parametrize("state", ["waiting", "decode"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
@pytest.mark.parametrize("method", ["unary", "stream"])
async def test_the_engine_forgets_the_request(
    plane: DataPlane, own_channel: grpc.aio.Channel, method: str, how: str, state: str
) -> None:
    plane.engine.steps_allowed = 0
    call = start(own_channel, method, timeout=0.3 if how == "deadline" else None)
    await reach(plane, state)
    assert plane.engine.used_blocks > 0
    if how == "cancel":
        call.cancel()
    elif how == "close":
        await own_channel.close()
    await plane.engine.until_idle()
    assert plane.engine.aborted == [plane.engine.requests[0].request_id]
    assert plane.engine.used_blocks == 0
    await asyncio.wait_for(plane.admission.wait_idle(), 20)
    expected = grpc.StatusCode.DEADLINE_EXCEEDED if how == "deadline" else grpc.StatusCode.CANCELLED
    assert await end_of(call, method) is expected


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
@pytest.mark.parametrize("method", ["unary", "stream"])
async def test_a_request_that_waits_for_its_adapter_never_reaches_the_engine(
    plane: DataPlane, own_channel: grpc.aio.Channel, method: str, how: str
) -> None:
    plane.engine.loads_allowed = False
    version = plane.add_adapter()
    stub = InferenceServiceStub(own_channel)
    spec, timeout = make_spec(model="pirate"), 0.3 if how == "deadline" else None
    call: Any
    if method == "unary":
        call = stub.Generate(GenerateRequest(spec=spec), timeout=timeout)
    else:
        call = stub.StreamGenerate(StreamGenerateRequest(spec=spec), timeout=timeout)
    await plane.engine.until(lambda: bool(plane.engine.received))
    if how == "cancel":
        call.cancel()
    elif how == "close":
        await own_channel.close()
    await asyncio.wait_for(plane.admission.wait_idle(), 20)
    plane.engine.allow_loads()
    await plane.engine.until(lambda: version.key in plane.engine.client.adapters.loaded)
    assert not plane.engine.requests
    assert plane.registry.get(version.version_name).num_requests == 0
    assert await end_of(call, method) is not grpc.StatusCode.OK


async def test_every_output_of_a_cancelled_request_is_forgotten(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(stopping=LONG, sampling={"n": 3})))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 3)
    call.cancel()
    await plane.engine.until_idle()
    assert sorted(plane.engine.aborted) == sorted(request.request_id for request in plane.engine.requests)


async def test_others_go_on_when_one_is_cancelled(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    gone = plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(stopping=LONG)))
    stays = asyncio.ensure_future(plane.generate(make_spec()))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
    gone.cancel()
    await plane.engine.until(lambda: len(plane.engine.sequences) == 1)
    plane.engine.allow_steps(10)
    assert (await stays).outputs[0].text == "abcab"


# ---- CancelGeneration ------------------------------------------------------------------------------------------------


async def started(plane: DataPlane, **metadata: str) -> tuple[Any, str]:
    """A stream that has begun and stands still, and its id."""
    plane.engine.steps_allowed = 1
    request = StreamGenerateRequest(spec=make_spec(stopping=LONG))
    call = plane.stub.StreamGenerate(request, metadata=tuple(metadata.items()))
    first = await next_of(call)
    return call, first.started.request_id


async def drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_cancel_generation_ends_the_call_with_cancelled_and_what_it_used(plane: DataPlane) -> None:
    call, request_id = await started(plane)
    response = await plane.stub.CancelGeneration(CancelGenerationRequest(request_ids=[request_id, "unknown"]))
    assert list(response.cancelled_request_ids) == [request_id]
    await plane.engine.until_idle()
    failed = await failure(drain(call))
    assert (failed.code, failed.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
    assert failed.partial_usage.completion_tokens == 1


async def test_another_tenants_generation_cannot_be_cancelled(plane: DataPlane) -> None:
    call, request_id = await started(plane, **{"loraplex-tenant": "acme"})
    response = await plane.stub.CancelGeneration(CancelGenerationRequest(request_ids=[request_id]))
    assert not response.cancelled_request_ids
    assert plane.engine.sequences
    call.cancel()
    await plane.engine.until_idle()


async def test_a_generation_that_has_ended_is_left_out(plane: DataPlane) -> None:
    request_id = (await plane.stream(make_spec()))[0].started.request_id
    response = await plane.stub.CancelGeneration(CancelGenerationRequest(request_ids=[request_id]))
    assert not response.cancelled_request_ids


@pytest.mark.parametrize("count", [0, 257])
async def test_cancel_generation_takes_1_to_256_ids(plane: DataPlane, count: int) -> None:
    failed = await failure(plane.stub.CancelGeneration(CancelGenerationRequest(request_ids=["x"] * count)))
    assert (failed.reason, failed.fields) == ("INVALID_PARAMETER", ["request_ids"])


# ---- callers that do not read ----------------------------------------------------------------------------------------


async def test_a_caller_that_does_not_read_is_cut_and_its_blocks_are_free(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(unread_seconds=0.2), max_pending_tokens=1 << 40) as plane:
        plane.endless()
        request = StreamGenerateRequest(spec=make_spec("x" * 50, stopping={}, output={"top_logprobs": 20}))
        call = plane.stub.StreamGenerate(request)
        await next_of(call)
        await plane.engine.until_idle()
        failed = await failure(drain(call))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
        assert failed.partial_usage.completion_tokens > 0


async def test_a_caller_too_many_tokens_behind_is_cut(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, max_pending_tokens=64) as plane:
        plane.endless()
        plane.engine.tokens_per_step = 16
        request = StreamGenerateRequest(spec=make_spec("x" * 50, stopping={}, output={"top_logprobs": 20}))
        call = plane.stub.StreamGenerate(request)
        await next_of(call)
        await plane.engine.until_idle()
        failed = await failure(drain(call))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
