"""The client package against the real server: what the two of them promise together."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import loraplex
from loraplex import AsyncClient
from loraplex_service.admission.admission import AdmissionLimits
from loraplex_service.errors import Unavailable
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, make_spec


@pytest.fixture
async def client(plane: DataPlane) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(plane.address) as client:
        yield client


async def test_generate(client: AsyncClient) -> None:
    response = await client.generate("demo", "abc", max_tokens=5)
    assert response.outputs[0].text == "abcab"


async def test_stream_adds_up_to_what_generate_returns(client: AsyncClient) -> None:
    stream = client.stream_generate("demo", "abc", max_tokens=5, temperature=0)
    async for _ in stream:
        pass
    assert stream.completed is not None
    assert stream.completed.usage.completion_tokens == 5


async def test_leaving_a_stream_frees_its_blocks(plane: DataPlane, client: AsyncClient) -> None:
    plane.engine.steps_allowed = 1
    async with client.stream_generate("demo", "abc", max_tokens=100) as stream:
        async for _ in stream:
            break
    await plane.engine.until_idle()
    assert plane.engine.used_blocks == 0


async def test_chat(plane: DataPlane, client: AsyncClient) -> None:
    await client.generate("demo", [{"role": "user", "content": "hi"}], max_tokens=1)
    assert bytes(plane.engine.requests[0].prompt_token_ids) == b"[user]hi[assistant]"


async def test_errors_arrive_with_their_details(client: AsyncClient) -> None:
    with pytest.raises(loraplex.InvalidArgument) as raised:
        await client.generate("demo", "abc", top_p=2.0)
    assert raised.value.reason == "INVALID_PARAMETER"
    assert [violation.field for violation in raised.value.violations] == ["spec.sampling.top_p"]


@pytest.mark.parametrize("method", ["unary", "stream"])
async def test_a_server_that_cannot_now_is_asked_again_by_itself(
    plane: DataPlane, client: AsyncClient, method: str
) -> None:
    """The refusal must carry no headers of its own: they would end the client's right to retry."""
    refused = asyncio.Event()

    class Reluctant(dict[str, Unavailable]):
        def __contains__(self, name: object) -> bool:
            first = not refused.is_set()
            refused.set()
            return first

    problem = Unavailable("MODEL_LOADING", "soon", retry_after_seconds=0.01)
    plane.models.problems = Reluctant(demo=problem)  # type: ignore[assignment]
    if method == "unary":
        assert (await client.generate("demo", "abc", max_tokens=5)).outputs[0].text == "abcab"
    else:
        assert [event async for event in client.stream_generate("demo", "abc", max_tokens=5)]
    assert refused.is_set()


async def test_a_server_that_goes_on_refusing_is_given_up(byte_tokenizer: Tokenizer) -> None:
    limits = AdmissionLimits(sequences=0.25, retry_after_seconds=0.01)
    async with data_plane(byte_tokenizer, limits) as plane, AsyncClient(plane.address) as client:
        plane.engine.steps_allowed = 0
        running = asyncio.ensure_future(plane.generate(make_spec()))
        await plane.engine.until(lambda: bool(plane.engine.sequences))
        with pytest.raises(loraplex.Unavailable) as raised:
            await client.generate("demo", "abc", max_tokens=5)
        assert (raised.value.reason, raised.value.retry_after) == ("OVERLOADED", 0.01)
        plane.engine.allow_steps(10)
        await running


async def test_nothing_is_generated_twice_when_the_engine_dies_in_mid_stream(
    plane: DataPlane, client: AsyncClient
) -> None:
    plane.engine.steps_allowed = 1
    engine_died = Unavailable("ENGINE_RESTARTING", "soon", retry_after_seconds=0.01)

    async def read() -> None:
        async for message in client.stream_generate("demo", "abc", max_tokens=100):
            if message.HasField("delta"):
                plane.engine.client.fail(engine_died)

    with pytest.raises(loraplex.Unavailable) as raised:
        await read()
    assert raised.value.partial_usage is not None
    assert raised.value.partial_usage.usage.completion_tokens == 1
    assert len(plane.engine.requests) == 1
