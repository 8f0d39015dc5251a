"""What production cannot be made to do: each request ends with exactly one outcome, and nothing stays behind."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from loraplex import AsyncClient, Internal
from loraplex.v1.inference_pb2 import GenerateResponse
from tests.e2e.conftest import START_SECONDS
from tests.faults.engine import LOSSES, engines_with
from tests.faults.serving import MODEL, Serving, serving

PLACES = 4  # requests that run at once; as many again wait, and no step computes them
TOKENS = 150

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def fuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuse") / "fuse"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(fuse: Path) -> AsyncIterator[Serving]:
    async with serving(engines_with(fuse), max_num_seqs=PLACES) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Serving) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.addresses.data, timeout=START_SECONDS) as client:
        yield client


async def say(client: AsyncClient, number: int, begun: asyncio.Event | None = None) -> GenerateResponse:
    prompt, target = f"Tell me a story about {number} foxes.", ("pirate", MODEL)[number % 2]
    stream = client.stream_generate(target, prompt, max_tokens=TOKENS, temperature=0, token_ids=True, ignore_eos=True)
    async for event in stream:
        if begun is not None and event.HasField("delta"):
            begun.set()
    return await stream.collect()


def tokens(response: GenerateResponse) -> list[int]:
    return list(response.outputs[0].token_ids)


def light(fuse: Path, fault: str) -> None:
    """Not written in place: the engine must not read half of it."""
    new = fuse.with_suffix(".new")
    new.write_text(fault)
    new.rename(fuse)


async def pid(server: Serving) -> int | None:
    return server.app.host.get(MODEL).supervisor.pid


@pytest.mark.parametrize("fault", ["raise", "out of memory"])
async def test_a_step_that_fails_ends_its_own_requests_and_no_others(
    server: Serving, client: AsyncClient, fuse: Path, fault: str
) -> None:
    engine, expected = await pid(server), [tokens(await say(client, number)) for number in range(2 * PLACES)]
    begun = [asyncio.Event() for _ in range(PLACES)]
    struck = [asyncio.create_task(say(client, number, begun[number])) for number in range(PLACES)]
    await asyncio.gather(*(event.wait() for event in begun))
    others = [asyncio.create_task(say(client, number)) for number in range(PLACES, 2 * PLACES)]
    await server.until(lambda stats: stats.num_waiting == PLACES)
    light(fuse, fault)
    for outcome in await asyncio.gather(*struck, return_exceptions=True):
        assert isinstance(outcome, Internal)
        assert (outcome.reason, "injected" in str(outcome)) == ("ENGINE_ERROR", True)
    assert [tokens(answer) for answer in await asyncio.gather(*others)] == expected[PLACES:]
    assert await pid(server) == engine
    await server.until_nothing_is_held()


@pytest.mark.parametrize("fault", ["device error", "stuck", *LOSSES])
async def test_streams_go_on_without_a_gap_on_the_engine_that_follows(
    server: Serving, client: AsyncClient, fuse: Path, fault: str
) -> None:
    engine, expected = await pid(server), [tokens(await say(client, number)) for number in range(PLACES)]
    begun = [asyncio.Event() for _ in range(PLACES)]
    before = PLACES - 1 if fault == "request lost" else PLACES  # only a request that comes now can be lost
    streams = [asyncio.create_task(say(client, number, begun[number])) for number in range(before)]
    await asyncio.gather(*(event.wait() for event in begun[:before]))
    light(fuse, fault)
    streams += [asyncio.create_task(say(client, number)) for number in range(before, PLACES)]
    assert [tokens(answer) for answer in await asyncio.gather(*streams)] == expected
    assert not fuse.exists()  # noqa: ASYNC240
    # The last frame of all may be what is lost, and every caller have what it wants from the next life only.
    await server.app.host.get(MODEL).wait_settled()
    assert await pid(server) != engine
    await server.until_nothing_is_held()
