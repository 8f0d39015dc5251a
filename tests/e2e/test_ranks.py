"""A model of two ranks or stages, one of which is killed or stopped under streams: the streams do not notice."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import AsyncClient
from tests.e2e.conftest import DEMO, MODELS, START_SECONDS, Server, running_server

STREAMS, TOKENS = 32, 48
HEARTBEAT_TIMEOUT_SECONDS = 10.0
HANGING_SECONDS = 300.0  # ends what would never end

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tensor_parallel", "pipeline_parallel"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    name = "storyteller"
    model = {"name": name, "model": str(DEMO / "models" / name), "dtype": "float32", "kv_cache_bytes": 16 << 20}
    model |= {"device": "cpu", request.param: 2}
    supervision = {
        "heartbeat_seconds": 0.2,
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT_SECONDS,
        "restart_delay_seconds": 0.1,
        "stable_seconds": 0.0,
        "resume_seconds": HANGING_SECONDS,
    }
    adapters = [{"name": each, "model": name, "source": str(DEMO / "adapters" / each)} for each in MODELS[name]]
    directory = tmp_path_factory.mktemp("ranks")
    with running_server(directory, models=[model], adapters=adapters, supervision=supervision) as server:
        yield server


def ranks(server: Server) -> tuple[int, int]:
    """The pids of the engine, which is the first rank, and of the second, its child."""
    (engine,) = server.engine_pids()
    (pid,) = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    return engine, int(pid)


async def generated(client: AsyncClient, number: int, begun: asyncio.Semaphore) -> list[int]:
    model = ("storyteller", *MODELS["storyteller"])[number % 5]
    stream = client.stream_generate(
        model, f"A story of {number} hens.", max_tokens=TOKENS, ignore_eos=True, token_ids=True, temperature=0.0
    )
    async for event in stream:
        if event.HasField("delta"):
            begun.release()
    return list((await stream.collect()).outputs[0].token_ids)


async def test_an_idle_rank_that_stands_still_is_replaced(server: Server) -> None:
    async with AsyncClient(server.data, timeout=HANGING_SECONDS) as client, asyncio.timeout(HANGING_SECONDS):
        await client.wait_until_serving("models/storyteller", timeout=START_SECONDS)
        engine, struck = ranks(server)
        ends = [os.pidfd_open(pid) for pid in (engine, struck)]
        os.kill(struck, signal.SIGSTOP)
        for end in ends:
            ended, _, _ = await asyncio.to_thread(select.select, [end], [], [], HANGING_SECONDS)
            assert ended
            os.close(end)
        await client.wait_until_serving("models/storyteller", timeout=START_SECONDS)
        assert await generated(client, 0, asyncio.Semaphore(0))


@pytest.mark.parametrize("rank", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_streams_outlive_a_rank_token_by_token(server: Server, fault: signal.Signals, rank: int) -> None:
    async with AsyncClient(server.data, timeout=HANGING_SECONDS) as client, asyncio.timeout(HANGING_SECONDS):
        await client.wait_until_serving("models/storyteller", timeout=START_SECONDS)
        begun = asyncio.Semaphore(0)
        expected = await asyncio.gather(*(generated(client, number, begun) for number in range(STREAMS)))
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(generated(client, number, begun)) for number in range(STREAMS)]
        for _ in range(STREAMS):
            await begun.acquire()
        before = ranks(server)
        os.kill(before[rank], fault)
        assert await asyncio.gather(*streams) == expected
        assert not {*ranks(server)} & {*before}
