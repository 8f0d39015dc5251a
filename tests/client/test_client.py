"""The blocking clients against a real server: the same behaviour, from a thread of their own."""

import asyncio
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from google.rpc import code_pb2

import loraplex
from loraplex import AdminClient, Client, generate_spec
from tests.waits import MOST_SECONDS

if TYPE_CHECKING:
    from tests.client.conftest import FakeServer


async def in_thread(work: Callable[[], None]) -> None:
    """Run blocking calls beside the event loop, in which the server runs."""
    await asyncio.to_thread(work)


async def seen(event: asyncio.Event) -> None:
    """Wait for what must happen; the limit only ends a test that fails."""
    async with asyncio.timeout(MOST_SECONDS):
        await event.wait()


async def test_generate_round_trip(server: "FakeServer") -> None:
    def work() -> None:
        with Client(server.address, token="secret", timeout=MOST_SECONDS) as client:
            assert client.generate("demo", "Once upon", temperature=0).outputs[0].text == "Once upon"

    await in_thread(work)
    assert server.inference.specs == [generate_spec("demo", "Once upon", temperature=0)]
    assert server.inference.metadata[0]["authorization"] == "Bearer secret"


async def test_a_stream_gives_its_events_in_order(server: "FakeServer") -> None:
    def work() -> None:
        with Client(server.address, timeout=MOST_SECONDS) as client:
            stream = client.stream_generate("demo", "Once upon")
            events = [message.WhichOneof("event") for message in stream]
            assert events == ["started", "delta", "delta", "finished", "completed"]
            assert stream.started is not None
            assert stream.completed is not None
            with pytest.raises(StopIteration):
                next(stream)

    await in_thread(work)


async def test_text_and_collect(server: "FakeServer") -> None:
    def work() -> None:
        with Client(server.address, timeout=MOST_SECONDS) as client:
            assert list(client.stream_generate("demo", "Once upon").text()) == ["Once ", "upon "]
            answer = client.stream_generate("demo", "Once upon").collect()
            assert (answer.outputs[0].text, answer.seed) == ("Once upon ", 7)

    await in_thread(work)


def leave_by_break(client: Client) -> None:
    stream = client.stream_generate("demo", "endless")
    for _ in stream:
        break
    with pytest.raises(loraplex.Cancelled):
        for _ in stream:
            pass


def leave_the_text_by_break(client: Client) -> None:
    for _ in client.stream_generate("demo", "endless").text():
        break


def leave_by_exception(client: Client) -> None:
    def read() -> None:
        for _ in client.stream_generate("demo", "endless"):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        read()


def leave_the_context(client: Client) -> None:
    with client.stream_generate("demo", "endless") as stream:
        next(stream)


def drop(client: Client) -> None:
    stream = client.stream_generate("demo", "endless")
    next(stream)
    del stream
    gc.collect()


def cancel(client: Client) -> None:
    stream = client.stream_generate("demo", "endless")
    next(stream)
    stream.cancel()
    with pytest.raises(loraplex.Cancelled):
        stream.collect()


LEAVING = [leave_by_break, leave_the_text_by_break, leave_by_exception, leave_the_context, drop, cancel]


@pytest.mark.parametrize("leave", LEAVING)
async def test_leaving_a_stream_cancels_it(server: "FakeServer", leave: Callable[[Client], None]) -> None:
    client = Client(server.address, timeout=MOST_SECONDS)
    await in_thread(lambda: leave(client))
    await seen(server.inference.cancelled)  # while the client is open: closing it would cancel too
    client.close()


async def test_closing_the_client_cancels(server: "FakeServer") -> None:
    def work() -> None:
        client = Client(server.address, timeout=MOST_SECONDS)
        stream = client.stream_generate("demo", "endless")
        next(stream)
        client.close()
        with pytest.raises(loraplex.Cancelled):
            stream.collect()

    await in_thread(work)
    await seen(server.inference.cancelled)


async def test_reading_one_message_leaves_the_call_running(server: "FakeServer") -> None:
    def work() -> None:
        with (
            Client(server.address, timeout=MOST_SECONDS) as client,
            client.stream_generate("demo", "endless") as stream,
        ):
            for _ in range(20):
                next(stream)
            assert not server.inference.cancelled.is_set()

    await in_thread(work)


async def test_failures(server: "FakeServer") -> None:
    def work() -> None:
        with Client(server.address, timeout=MOST_SECONDS) as client:
            with pytest.raises(loraplex.Unavailable, match="the engine ended") as raised:
                client.stream_generate("demo", "fail").collect()
            assert raised.value.partial_usage is not None
            with pytest.raises(loraplex.IncompleteStream):
                client.stream_generate("demo", "cut").collect()
            with pytest.raises(loraplex.DeadlineExceeded):
                client.stream_generate("demo", "endless", timeout=0.05).collect()

    await in_thread(work)


async def test_unavailable_is_tried_three_times(server: "FakeServer") -> None:
    server.inference.fail_next(code_pb2.UNAVAILABLE, times=3)

    def work() -> None:
        with Client(server.address, timeout=MOST_SECONDS) as client:
            with pytest.raises(loraplex.Unavailable):
                client.generate("demo", "Once")
            assert client.generate("demo", "Once").outputs[0].text == "Once"

    await in_thread(work)
    assert len(server.inference.specs) == 4


async def test_admin(server: "FakeServer", adapter_directory: str) -> None:
    def work() -> None:
        with AdminClient(server.address, timeout=MOST_SECONDS) as admin:
            assert len(admin.list_models()) == 5
            assert admin.load_model("demo").name == "models/demo"
            adapter = admin.upload_adapter("legal", base_model="demo", directory=adapter_directory, tenant="acme")
            assert adapter.name == "tenants/acme/adapters/legal"
            assert adapter.digest == "adapter_config.json=2,adapter_model.safetensors=2097157"
            for message in admin.watch_models():
                assert message.model.name == "models/m0"
                break
            admin.wait_until_serving(timeout=MOST_SECONDS)
            assert admin.is_serving()

    await in_thread(work)
    await seen(server.models.watch_cancelled)
