"""Answers in one piece have a size, and who does not read them gets no more of them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex.v1.inference_pb2 import BatchGenerateRequest, GenerateRequest
from loraplex_service.admission.places import UnreadAnswers
from loraplex_service.errors import SlowConsumer
from loraplex_service.ports.interceptors import CallLimits
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec
from tests.service.ports.http2_caller import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Http2Caller,
    call_headers,
    frame,
    message,
)
from tests.waits import MOST_SECONDS

BATCH = "/loraplex.v1.InferenceService/BatchGenerate"
GENERATE = "/loraplex.v1.InferenceService/Generate"
LARGE: dict[str, Any] = {"stopping": {"max_tokens": 100}, "sampling": {"n": 4}, "output": {"top_logprobs": 20}}
LARGE_BYTES = 100_000  # such an answer has more, and gRPC does not take it off our hands


def ask(caller: Http2Caller, method: str, data: bytes) -> None:
    [stream] = caller.streams(1)
    headers = call_headers(method, [("loraplex-tenant", "silent")])
    caller.send(frame(HEADERS, END_HEADERS, stream, headers) + frame(DATA, END_STREAM, stream, message(data)))


def silent_caller(plane: DataPlane, window: int = 0) -> Http2Caller:
    """Takes no more of any answer than its window lets through."""
    caller = Http2Caller(plane.address, window)
    caller.settle()
    return caller


async def test_an_answer_beyond_its_limit_ends_the_call_and_the_generation(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=LARGE_BYTES)) as plane:
        failed = await failure(plane.generate(make_spec(**LARGE)))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert failed.partial_usage.completion_tokens > 0
        await plane.engine.until_idle()


async def test_an_answer_beyond_its_limit_can_be_streamed(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=LARGE_BYTES)) as plane:
        assert (await plane.stream(make_spec(**LARGE)))[-1].completed.usage.completion_tokens == 400


async def test_an_item_of_a_batch_beyond_the_limit_fails_alone(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=LARGE_BYTES)) as plane:
        request = BatchGenerateRequest(specs=[make_spec(), make_spec(**LARGE)])
        items = {item.index: item async for item in plane.stub.BatchGenerate(request) if not item.HasField("started")}
        assert items[0].response.outputs[0].text == "abcab"
        assert items[1].error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


async def answers_of(plane: DataPlane, tenant: str) -> AsyncIterator[str]:
    """What one call after the other gets: "OK", or why not."""
    async with asyncio.timeout(MOST_SECONDS):
        while True:
            try:
                await plane.generate(make_spec(**LARGE), metadata=(("loraplex-tenant", tenant),))
                yield "OK"
            except grpc.aio.AioRpcError as error:
                yield f"{error.code().name}: {error.details()}"


async def test_a_tenant_that_does_not_read_gets_no_more_answers_and_others_do(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(unread_bytes=LARGE_BYTES)) as plane:
        caller = await asyncio.to_thread(silent_caller, plane)
        ask(caller, GENERATE, GenerateRequest(spec=make_spec(**LARGE)).SerializeToString())
        refused = await anext(answer async for answer in answers_of(plane, "silent") if answer != "OK")
        assert refused.startswith("RESOURCE_EXHAUSTED")
        assert "wait to be read" in refused
        assert await anext(answers_of(plane, "other")) == "OK"
        caller.close()
        assert await anext(answer async for answer in answers_of(plane, "silent") if answer == "OK")


async def test_a_batch_that_is_not_read_does_not_go_on(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer) as plane:
        caller = await asyncio.to_thread(silent_caller, plane, 1000)  # enough for the ids of the items
        request = BatchGenerateRequest(specs=[make_spec(**LARGE)] * 10, max_concurrency=1)
        ask(caller, BATCH, request.SerializeToString())
        await plane.engine.until(lambda: len(plane.engine.requests) > 0)
        for _ in range(20):  # others go on meanwhile
            await plane.generate(make_spec())
        await plane.engine.until_idle()
        of_the_batch = [request for request in plane.engine.requests if request.tenant == "silent"]
        assert len(of_the_batch) <= 4 * 5  # one written, one in gRPC's buffer, one queued, one that waits to be
        caller.close()


def test_one_answer_may_be_larger_than_all_that_may_be_unread() -> None:
    unread = UnreadAnswers(most_bytes=10)
    unread.send("a", 100)
    with pytest.raises(SlowConsumer):
        unread.send("a", 1)
    unread.send("b", 1)
    unread.sent("a", 100)
    unread.send("a", 100)
