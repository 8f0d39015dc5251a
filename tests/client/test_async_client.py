"""The asynchronous clients against a real server."""

import asyncio
import gc
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2

import loraplex
from loraplex import AsyncAdminClient, AsyncClient, generate_spec
from tests.waits import MOST_SECONDS

if TYPE_CHECKING:
    from tests.client.conftest import FakeServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def seen(event: asyncio.Event) -> None:
    """Wait for what must happen; the limit only ends a test that fails."""
    async with asyncio.timeout(MOST_SECONDS):
        await event.wait()


# ---- answers -------------------------------------------------------------------------------------------------------


async def test_generate_round_trip(server: "FakeServer", client: AsyncClient) -> None:
    answer = await client.generate("demo", "Once upon", temperature=0, max_tokens=None)
    assert answer.outputs[0].text == "Once upon"
    [spec] = server.inference.specs
    assert spec == generate_spec("demo", "Once upon", temperature=0)
    assert spec.sampling.HasField("temperature")
    assert not spec.stopping.HasField("max_tokens")


async def test_metadata_reaches_the_server(server: "FakeServer") -> None:
    async with AsyncClient(server.address, token="secret", tenant="acme") as client:
        await client.generate("demo", "Once", routing_key="k", client_request_id="mine")
    [metadata] = server.inference.metadata
    sent = {key: metadata[key] for key in ("authorization", "loraplex-tenant", "loraplex-routing-key", "x-request-id")}
    assert sent == {
        "authorization": "Bearer secret",
        "loraplex-tenant": "acme",
        "loraplex-routing-key": "k",
        "x-request-id": "mine",
    }


async def test_routers_are_told_of_the_adapter_in_metadata(server: "FakeServer") -> None:
    async with AsyncClient(server.address) as client:
        await client.generate("acme*0.7 + b", "Once")
        await client.generate("models/demo", "Once")
        await client.generate("légal", "Once")
        await client.generate("demo", "Once", metadata={"loraplex-adapter": "mine"})
    told = [metadata.get("loraplex-adapter") for metadata in server.inference.metadata]
    assert told == ["acme*0.7 + b", None, None, "mine"]


async def test_a_stream_gives_its_events_in_order(client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "Once upon")
    events = [message.WhichOneof("event") async for message in stream]
    assert events == ["started", "delta", "delta", "finished", "completed"]
    assert stream.started is not None
    assert stream.started.prompt_tokens == 2
    assert stream.completed is not None
    assert stream.completed.seed == 7


async def test_text_of_a_stream(client: AsyncClient) -> None:
    assert [piece async for piece in client.stream_generate("demo", "Once upon").text()] == ["Once ", "upon "]


async def test_text_of_another_output(client: AsyncClient) -> None:
    assert [piece async for piece in client.stream_generate("demo", "Once upon").text(output_index=1)] == []


async def test_a_collected_stream_is_what_generate_returns(client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "Once upon")
    await anext(stream)  # reading one message first loses nothing
    answer = await stream.collect()
    [output] = answer.outputs
    assert (answer.request_id, answer.seed, answer.usage.completion_tokens) == ("r1", 7, 2)
    assert (output.text, list(output.token_ids)) == ("Once upon ", [0, 1])
    assert output.finished.reason != 0


async def test_a_stream_that_ended_stays_ended(client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "Once upon")
    await stream.collect()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_batch_items_succeed_or_fail_alone(client: AsyncClient) -> None:
    specs = [generate_spec("demo", "good"), generate_spec("demo", "bad")]
    results = {message.index: message async for message in client.batch_generate(specs)}
    assert results[0].response.outputs[0].text == "good"
    assert isinstance(loraplex.from_status(results[1].error), loraplex.InvalidArgument)


async def test_tokens_and_back(client: AsyncClient) -> None:
    tokens = (await client.tokenize("demo", "Héllo")).token_ids
    assert (await client.detokenize("demo", list(tokens))).text == "Héllo"


# ---- cancellation --------------------------------------------------------------------------------------------------


async def test_break_cancels(server: "FakeServer", client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "endless")
    async for _ in stream:
        break
    await seen(server.inference.cancelled)


async def test_break_from_the_text_cancels(server: "FakeServer", client: AsyncClient) -> None:
    async for _ in client.stream_generate("demo", "endless").text():
        break
    await seen(server.inference.cancelled)


async def test_an_exception_in_the_loop_cancels(server: "FakeServer", client: AsyncClient) -> None:
    async def read() -> None:
        async for _ in client.stream_generate("demo", "endless"):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await read()
    await seen(server.inference.cancelled)


async def test_reading_one_message_leaves_the_call_running(server: "FakeServer", client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "endless")
    for _ in range(20):
        await anext(stream)
    assert not server.inference.cancelled.is_set()
    stream.cancel()
    await seen(server.inference.cancelled)


async def test_the_end_of_a_context_cancels(server: "FakeServer", client: AsyncClient) -> None:
    async with client.stream_generate("demo", "endless") as stream:
        await anext(stream)
    await seen(server.inference.cancelled)


async def test_a_dropped_stream_is_cancelled(server: "FakeServer", client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "endless")
    await anext(stream)
    del stream
    gc.collect()
    await seen(server.inference.cancelled)


async def test_cancelling_the_task_cancels_the_call(server: "FakeServer", client: AsyncClient) -> None:
    first = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream_generate("demo", "endless"):
            first.set()

    task = asyncio.create_task(read())
    await seen(first)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await seen(server.inference.cancelled)


async def test_a_stream_whose_reader_was_cancelled_does_not_look_whole(admin: AsyncAdminClient) -> None:
    first = asyncio.Event()
    stream = admin.watch_models()

    async def read() -> None:
        async for _ in stream:
            first.set()

    task = asyncio.create_task(read())
    await seen(first)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(loraplex.Cancelled):
        await anext(stream)


async def test_closing_the_client_cancels(server: "FakeServer") -> None:
    client = AsyncClient(server.address)
    stream = client.stream_generate("demo", "endless")
    await anext(stream)
    await client.close()
    await seen(server.inference.cancelled)


async def test_reading_a_cancelled_stream_says_so_once(client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "endless")
    await anext(stream)
    stream.cancel()
    with pytest.raises(loraplex.Cancelled):
        await stream.collect()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_cancel_from_another_task_ends_the_reader_with_an_error(client: AsyncClient) -> None:
    first = asyncio.Event()
    stream = client.stream_generate("demo", "endless")

    async def read() -> None:
        async for _ in stream:
            first.set()

    task = asyncio.create_task(read())
    await seen(first)
    stream.cancel()
    with pytest.raises(loraplex.Cancelled):
        await task


async def test_break_cancels_a_watch_too(server: "FakeServer", admin: AsyncAdminClient) -> None:
    async for message in admin.watch_models():
        assert message.model.name == "models/m0"
        break
    await seen(server.models.watch_cancelled)


# ---- failures ------------------------------------------------------------------------------------------------------


async def test_a_failure_in_mid_stream_keeps_what_came_before(client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "fail")
    assert [(await anext(stream)).WhichOneof("event") for _ in range(2)] == ["started", "delta"]
    with pytest.raises(loraplex.Unavailable, match="the engine ended") as raised:
        await anext(stream)
    assert raised.value.partial_usage is not None
    assert raised.value.partial_usage.usage.completion_tokens == 1


async def test_a_started_stream_is_not_tried_again(server: "FakeServer", client: AsyncClient) -> None:
    with pytest.raises(loraplex.Unavailable):
        await client.stream_generate("demo", "fail").collect()
    assert len(server.inference.specs) == 1


async def test_a_stream_without_its_last_message_did_not_succeed(client: AsyncClient) -> None:
    text = client.stream_generate("demo", "cut").text()
    assert await anext(text) == "cut "
    with pytest.raises(loraplex.IncompleteStream, match="without its last message"):
        await anext(text)


async def test_unavailable_is_tried_again_before_the_call_is_admitted(
    server: "FakeServer", client: AsyncClient
) -> None:
    server.inference.fail_next(code_pb2.UNAVAILABLE, times=2)
    assert (await client.generate("demo", "Once")).outputs[0].text == "Once"
    server.inference.fail_next(code_pb2.UNAVAILABLE, times=2)
    assert (await client.stream_generate("demo", "Once").collect()).outputs[0].text == "Once "
    assert len(server.inference.specs) == 6


async def test_unavailable_three_times_is_an_error(server: "FakeServer", client: AsyncClient) -> None:
    server.inference.fail_next(code_pb2.UNAVAILABLE, times=3)
    with pytest.raises(loraplex.Unavailable) as raised:
        await client.generate("demo", "Once")
    assert raised.value.retry_after == 2
    assert server.inference.failures == []


async def test_quota_is_not_tried_again(server: "FakeServer", client: AsyncClient) -> None:
    server.inference.fail_next(code_pb2.RESOURCE_EXHAUSTED)
    with pytest.raises(loraplex.ResourceExhausted) as raised:
        await client.generate("demo", "Once")
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(server.inference.specs) == 1


async def test_a_timeout_is_deadline_exceeded(client: AsyncClient) -> None:
    with pytest.raises(loraplex.DeadlineExceeded):
        await client.stream_generate("demo", "endless", timeout=0.05).collect()


async def test_methods_that_the_server_lacks_are_unsupported(admin: AsyncAdminClient) -> None:
    with pytest.raises(loraplex.Unsupported):
        await admin.get_server_info()


def test_a_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("127.0.0.1:1")


# ---- admin ---------------------------------------------------------------------------------------------------------


async def test_lists_are_read_page_by_page(admin: AsyncAdminClient) -> None:
    assert [model.name for model in await admin.list_models()] == [f"models/m{i}" for i in range(5)]


async def test_loading_a_model_with_waiting(server: "FakeServer", admin: AsyncAdminClient) -> None:
    model = await admin.load_model("demo", wait=2.5)
    assert model.name == "models/demo"
    assert server.models.requests[0].wait.ToNanoseconds() == 2_500_000_000


async def test_a_model_that_failed_can_be_raised(admin: AsyncAdminClient) -> None:
    model = await admin.load_model("broken")
    with pytest.raises(loraplex.FailedPrecondition, match="no weights"):
        loraplex.raise_for_error(model)


async def test_upload(server: "FakeServer", admin: AsyncAdminClient, adapter_directory: Path) -> None:
    adapter = await admin.upload_adapter("legal", base_model="demo", directory=adapter_directory, pinned=True)
    assert adapter.digest == "adapter_config.json=2,adapter_model.safetensors=2097157"
    assert server.adapters.requests[0].adapter.pinned


async def test_health(server: "FakeServer", client: AsyncClient) -> None:
    await server.health.set("models/demo", SERVING)
    await server.health.set("models/other", NOT_SERVING)
    assert await client.is_serving()
    assert await client.is_serving("models/demo")
    assert not await client.is_serving("models/other")
    with pytest.raises(loraplex.NotFound):
        await client.is_serving("models/nobody")


async def test_waiting_until_a_model_is_serving(server: "FakeServer", client: AsyncClient) -> None:
    await server.health.set("models/demo", NOT_SERVING)
    waiting = asyncio.create_task(client.wait_until_serving("models/demo", timeout=MOST_SECONDS))
    await asyncio.sleep(0)
    assert not waiting.done()
    await server.health.set("models/demo", SERVING)
    await waiting


async def test_waiting_has_an_end(server: "FakeServer", client: AsyncClient) -> None:
    await server.health.set("models/demo", NOT_SERVING)
    with pytest.raises(loraplex.DeadlineExceeded):
        await client.wait_until_serving("models/demo", timeout=0.05)
