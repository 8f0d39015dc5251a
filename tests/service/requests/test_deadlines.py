"""Calls that the server ends itself, just before their deadline: so that the caller hears what they took."""

import asyncio

import pytest
from grpc import StatusCode as Code

from loraplex.v1.inference_pb2 import BatchGenerateRequest, PartialUsage
from loraplex_service.call import Call
from loraplex_service.requests.in_flight import InFlight, end_before
from tests.service.data_plane import DataPlane, failure, make_spec


@pytest.fixture(autouse=True)
def deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's idea of a call's deadline; the caller has none, so that nothing depends on who is faster."""
    monkeypatch.setattr(
        "loraplex_service.ports.interceptors._deadline", lambda context: asyncio.get_running_loop().time() + 0.1
    )


@pytest.mark.parametrize("method", ["stream", "generate"])
async def test_a_status_tells_what_was_consumed(plane: DataPlane, method: str) -> None:
    plane.endless()
    plane.engine.steps_allowed = 2
    failed = await failure(getattr(plane, method)(make_spec("abc", stopping={})))
    assert (failed.code, failed.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert (failed.partial_usage.prompt_tokens, failed.partial_usage.completion_tokens) == (3, 2)
    await plane.engine.until_idle()


async def test_a_request_that_waits_for_its_adapter_ends_too(plane: DataPlane) -> None:
    plane.engine.loads_allowed = False
    plane.add_adapter()
    failed = await failure(plane.generate(make_spec(model="pirate")))
    assert (failed.code, failed.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_the_items_of_a_batch_end_each_with_what_it_consumed(plane: DataPlane) -> None:
    plane.endless()
    plane.engine.steps_allowed = 1
    request = BatchGenerateRequest(specs=[make_spec("abc", stopping={}), make_spec("abcde", stopping={})])
    usage: dict[int, int] = {}

    async def read() -> None:
        async for response in plane.stub.BatchGenerate(request):
            if response.HasField("error"):
                [packed] = [detail for detail in response.error.details if detail.Is(PartialUsage.DESCRIPTOR)]
                partial = PartialUsage()
                packed.Unpack(partial)
                usage[response.index] = partial.usage.prompt_tokens

    assert (await failure(read())).code is Code.DEADLINE_EXCEEDED
    assert usage == {0: 3, 1: 5}


async def test_a_request_that_ends_in_time_leaves_nothing_behind(plane: DataPlane) -> None:
    await plane.generate(make_spec("abc"))
    assert not plane.entrance.requests._by_id


@pytest.mark.parametrize(("seconds", "margin"), [(1e6, 0.02), (0.1, 0.005)])
async def test_the_end_comes_a_little_before_the_deadline(seconds: float, margin: float) -> None:
    call = Call("acme", arrival=0.0, deadline=seconds)
    timer = end_before(seconds, InFlight(call))
    assert timer.when() == pytest.approx(seconds - margin)
    timer.cancel()
