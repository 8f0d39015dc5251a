"""Connections made to hurt: many calls on one, calls without a message, resets, and nobody else suffers."""

import asyncio
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2

from loraplex.v1.inference_pb2 import GenerateRequest
from loraplex_service.ports.interceptors import PUBLIC_CALLS_PER_HOST, CallLimits
from loraplex_service.ports.listeners import ConnectionLimits
from loraplex_service.ports.receiving import ReceiveLimits
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure_of, make_spec
from tests.service.health_calls import health_of
from tests.service.ports.guarded import Guarded, guarded_server
from tests.service.ports.http2_caller import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    FIRST_DYNAMIC_INDEX,
    GOAWAY,
    HEADERS,
    INDEXED,
    LITERAL_WITH_INDEX,
    RST_STREAM,
    Http2Caller,
    call_headers,
    frame,
    literals,
    message,
    number,
)
from tests.waits import MOST_SECONDS

GENERATE = "/loraplex.v1.InferenceService/Generate"
WATCH = "/grpc.health.v1.Health/Watch"
REQUEST = GenerateRequest(spec=make_spec()).SerializeToString()
MOST_BYTES = 64 << 20
MOST_HELD_MS = 50.0  # at a time
PER_CONNECTION = ConnectionLimits().calls


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_directory: Path) -> Iterator[Guarded]:
    with guarded_server(tmp_path_factory.mktemp("guarded"), byte_tokenizer_directory) as server:
        with other_caller(server):
            pass  # what is loaded with the first call is loaded
        yield server


@dataclass
class Answers:
    """What one caller got, one call after the other."""

    good: int = 0
    errors: list[str] = field(default_factory=list)


@contextmanager
def other_caller(server: Guarded) -> Iterator[Answers]:
    """A caller of another tenant, who calls all the time, on a connection of its own."""
    answers, stop = Answers(), threading.Event()
    with grpc.insecure_channel(server.address) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GENERATE)

        def go_on() -> None:
            while not stop.is_set():
                try:
                    call(REQUEST, metadata=server.credentials(server.quiet), timeout=60)
                    answers.good += 1
                except grpc.RpcError as error:
                    answers.errors.append(f"{error.code()}: {error.details()}")

        thread = threading.Thread(target=go_on)
        call(REQUEST, metadata=server.credentials(server.quiet), timeout=60)
        thread.start()
        try:
            yield answers
        finally:
            stop.set()
            thread.join()


@contextmanager
def borne(server: Guarded) -> Iterator[None]:
    """What happens in the block costs little, and another caller does not notice it."""
    with server.strain() as strain, other_caller(server) as answers:
        yield
    assert answers.errors == []
    assert answers.good > 0
    assert strain.peak_bytes <= MOST_BYTES
    assert strain.held_ms <= MOST_HELD_MS


def ask_health(stream: int, service: str) -> bytes:
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    return frame(HEADERS, END_HEADERS, stream, call_headers(WATCH)) + frame(DATA, END_STREAM, stream, message(request))


@pytest.mark.parametrize("has_credentials", [False, True])
def test_calls_without_a_message_lock_nobody_out(server: Guarded, has_credentials: bool) -> None:
    headers = call_headers(GENERATE, server.credentials(server.loud if has_credentials else None))
    with borne(server), Http2Caller(server.address) as caller:
        caller.settle()
        for _ in range(17):
            caller.open(headers, 1000)
        caller.settle()


def test_ten_thousand_calls_that_come_in_no_time_cost_little(server: Guarded) -> None:
    headers = call_headers(GENERATE, server.credentials("lpx_nobody_nothing"))
    with borne(server), ExitStack() as stack:
        callers = [stack.enter_context(Http2Caller(server.address)) for _ in range(40)]
        for caller in callers:
            caller.settle()
        for caller in callers:
            caller.open(headers, 250)
        for caller in callers:
            caller.settle()


def test_watches_of_health_are_counted_by_their_host(server: Guarded) -> None:
    with borne(server), ExitStack() as stack:
        callers = [stack.enter_context(Http2Caller(server.address)) for _ in range(4)]
        for caller in callers:
            caller.settle()
            caller.send(b"".join(ask_health(stream, f"models/{stream}") for stream in caller.streams(PER_CONNECTION)))
        frames: Counter[int] = Counter()
        for caller in callers:  # headers come to each call, be it an answer or a refusal
            frames += caller.until(HEADERS, PER_CONNECTION) + caller.settle()
        assert 0 < frames[DATA] <= PUBLIC_CALLS_PER_HOST


@pytest.mark.parametrize("has_credentials", [False, True])
def test_calls_that_are_opened_and_reset_lock_nobody_out(server: Guarded, has_credentials: bool) -> None:
    headers = call_headers(GENERATE, server.credentials(server.loud if has_credentials else None))
    reset = struct.pack(">I", CANCEL)
    with borne(server), Http2Caller(server.address) as caller:
        caller.settle()
        for _ in range(50):
            streams = caller.streams(1000)
            caller.send(
                b"".join(
                    frame(HEADERS, END_HEADERS, stream, headers) + frame(RST_STREAM, 0, stream, reset)
                    for stream in streams
                )
            )
        caller.settle()


@pytest.mark.parametrize("references", [1, 2000])
def test_headers_that_name_large_ones_again_and_again_cost_little(server: Guarded, references: int) -> None:
    large = literals([("x-large", "x" * 3900)], LITERAL_WITH_INDEX)
    headers = call_headers(GENERATE) + number(FIRST_DYNAMIC_INDEX, 7, INDEXED) * references
    with borne(server), Http2Caller(server.address) as caller:
        caller.settle()
        caller.open(call_headers(GENERATE) + large)
        with suppress(ConnectionError):  # gRPC may have had enough
            for _ in range(10):
                caller.open(headers, 1000)
            caller.settle()


async def outcomes(server: Guarded, token: str | None, calls: int, connections: int) -> Counter[tuple[str, str, bool]]:
    """So many calls at once, on so many connections: their codes, reasons, and whether they were told when to retry."""
    local = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.address, options=local) for _ in range(connections)]
    seen: Counter[tuple[str, str, bool]] = Counter()

    async def one(channel: grpc.aio.Channel) -> None:
        try:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GENERATE)
            await call(REQUEST, metadata=server.credentials(token))
            seen["OK", "", False] += 1
        except grpc.aio.AioRpcError as error:
            failed = failure_of(error)
            seen[failed.code.name, failed.reason, failed.has_detail(RetryInfo)] += 1

    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    await asyncio.gather(*(one(channel) for channel in channels for _ in range(calls // connections)))
    await asyncio.gather(*(channel.close() for channel in channels))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("calls", "connections"), [(2000, 1), (10_000, 40)])  # 64 at a time on each
def test_of_thousands_of_calls_at_once_each_is_answered_or_told_why_not(
    server: Guarded, calls: int, connections: int
) -> None:
    with other_caller(server) as answers:
        seen = asyncio.run(outcomes(server, server.loud, calls, connections))
    assert sum(seen.values()) == calls
    assert set(seen) <= {("OK", "", False), ("UNAVAILABLE", "OVERLOADED", True)}
    assert answers.errors == []


@pytest.mark.slow
def test_ten_thousand_calls_without_credentials_are_refused_as_that(server: Guarded) -> None:
    with borne(server):
        seen = asyncio.run(outcomes(server, None, 10_000, 40))
    assert set(seen) == {("UNAUTHENTICATED", "UNAUTHENTICATED", False)}


# ---- in this process -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def caller_of(plane: DataPlane, window: int | None = None) -> AsyncIterator[Http2Caller]:
    caller = await asyncio.to_thread(Http2Caller, plane.address, window)
    try:
        await asyncio.to_thread(caller.settle)
        yield caller
    finally:
        caller.close()


async def test_a_watcher_without_a_window_stops_no_change_of_health(plane: DataPlane) -> None:
    async with caller_of(plane, window=0) as caller, asyncio.timeout(MOST_SECONDS):
        await asyncio.to_thread(caller.send, ask_health(1, "models/demo"))
        await asyncio.to_thread(caller.settle)
        for serving in (False, True, False):
            await plane.health.set_model("demo", serving)
    assert await health_of(plane.channel, "models/demo") == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_call_whose_message_does_not_come_ends(byte_tokenizer: Tokenizer) -> None:
    limits = CallLimits(receive=ReceiveLimits(message_seconds=0.2))
    async with data_plane(byte_tokenizer, limits=limits) as plane:
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = plane.channel.stream_unary(GENERATE)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call()
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message" in (raised.value.details() or "")


async def test_a_call_that_ends_without_a_message_is_told_so(plane: DataPlane) -> None:
    call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = plane.channel.stream_unary(GENERATE)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(iter([]))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_connection_without_a_call_is_closed(byte_tokenizer: Tokenizer) -> None:
    connections = ConnectionLimits(idle_seconds=0.2)
    async with data_plane(byte_tokenizer, connections=connections) as plane, caller_of(plane) as caller:
        await asyncio.to_thread(caller.until, GOAWAY)


async def test_a_port_takes_no_more_connections_than_it_may(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, connections=ConnectionLimits(connections=2)) as plane:
        await plane.generate(make_spec())  # on the first
        async with caller_of(plane):
            with pytest.raises(ConnectionError):
                async with caller_of(plane):
                    pass


async def test_one_tenant_does_not_take_the_places_of_another(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(calls_per_tenant=2)) as plane:
        plane.engine.steps_allowed = 0
        running = [asyncio.ensure_future(plane.generate(make_spec())) for _ in range(2)]
        await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
        with pytest.raises(grpc.aio.AioRpcError, match="2 calls are in progress"):
            await plane.generate(make_spec())
        other = asyncio.ensure_future(plane.generate(make_spec(), metadata=(("loraplex-tenant", "other"),)))
        await plane.engine.until(lambda: len(plane.engine.sequences) == 3)
        plane.engine.allow_steps(100)
        await asyncio.gather(*running, other)
        await plane.generate(make_spec())  # the places are free again
