"""Three times more than a real engine takes: whoever looks at the server is answered meanwhile."""

import asyncio
import urllib.request
from collections.abc import Iterator

import pytest

from loraplex import AsyncAdminClient, AsyncClient, Unavailable
from loraplex.v1.inference_pb2 import GenerateResponse
from tests.e2e.conftest import DEMO, START_SECONDS, Server, running_server

MODEL = "storyteller"
PLACES = 4  # requests that run at once
IN_FLIGHT = 4 * PLACES  # that are let in
TOKENS = 1500
LOOKS = 20
NO_RETRIES = {"grpc.enable_retries": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = {"name": MODEL, "model": str(DEMO / "models" / MODEL), "dtype": "float32", "threads": 1}
    with running_server(
        tmp_path_factory.mktemp("saturated"),
        models=[model | {"kv_cache_bytes": 64 << 20, "max_num_seqs": PLACES}],
        adapters=[],
        limits={"in_flight_sequences": IN_FLIGHT / PLACES},
        health_listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
    ) as server:
        yield server


async def say(client: AsyncClient, number: int) -> GenerateResponse:
    return await client.generate(MODEL, f"Tell me of {number} foxes.", max_tokens=TOKENS, ignore_eos=True)


async def look(server: Server, client: AsyncClient, probes: AsyncClient, admin: AsyncAdminClient) -> None:
    """At everything there is to look at."""
    for service in ("", "loraplex.v1.InferenceService", f"models/{MODEL}"):
        assert await client.is_serving(service)  # a full queue is not dead
    for service in ("startup", "liveness", "readiness"):
        assert await probes.is_serving(service)
    page = await asyncio.to_thread(scrape, server)
    assert f'loraplex_waiting_requests{{model="{MODEL}"}}' in page
    assert f'loraplex_waiting_requests{{model="{MODEL}"}} 0.0' not in page
    assert (await admin.get_server_info()).version
    assert [model.name for model in await admin.list_models()] == [f"models/{MODEL}"]
    assert await admin.list_adapters() == []
    assert await admin.list_routes() == []
    assert (await client.tokenize(MODEL, "A fox")).token_ids
    with pytest.raises(Unavailable) as refused:
        await say(client, 0)
    assert refused.value.reason == "OVERLOADED"


def scrape(server: Server) -> str:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=START_SECONDS) as response:
        return str(response.read().decode())


async def test_health_metrics_and_the_admin_port_answer_while_the_engine_has_too_much(server: Server) -> None:
    assert server.health is not None
    async with (
        asyncio.timeout(START_SECONDS),
        AsyncClient(server.data, options=NO_RETRIES) as client,
        AsyncClient(server.health) as probes,
        AsyncAdminClient(server.admin) as admin,
    ):
        await client.wait_until_serving(f"models/{MODEL}")
        callers = [asyncio.create_task(say(client, number)) for number in range(3 * IN_FLIGHT)]
        async for load in admin.watch_load(interval=0.1):
            [model] = load.models
            if model.running_requests == PLACES and sum(caller.done() for caller in callers) == 2 * IN_FLIGHT:
                break
        for caller in callers:
            if caller.done():
                assert isinstance(refused := caller.exception(), Unavailable)
                assert refused.reason == "OVERLOADED"
        for _ in range(LOOKS):
            await look(server, client, probes, admin)
        # Whatever ended meanwhile: there has been more than enough to do all the time.
        [model] = (await anext(admin.watch_load())).models
        assert model.waiting_requests > 0
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        async for load in admin.watch_load(interval=0.1):
            if not load.models[0].running_requests + load.models[0].waiting_requests:
                break
        assert (await client.generate(MODEL, "A fox", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
