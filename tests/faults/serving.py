"""The service in the test's own process, on true ports, with a true engine process that is asked for its figures."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import EngineStats
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.app import Addresses, running
from loraplex_service.assembly import Application, LaunchFor
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig, SupervisionConfig
from tests.e2e.conftest import DEMO, END_SECONDS, MODELS

MODEL = "storyteller"
HEARTBEAT_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True)
class Serving:
    """A running service with one model."""

    app: Application
    addresses: Addresses

    async def stats(self) -> EngineStats:
        """The engine's figures after everything that the service has told it so far."""
        client = self.app.host.get(MODEL).client
        assert client is not None
        async with asyncio.timeout(END_SECONDS):
            return (await client.ping()).stats

    async def until(self, condition: Callable[[EngineStats], bool]) -> EngineStats:
        async with asyncio.timeout(END_SECONDS):
            while not condition(stats := await self.stats()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return stats

    async def until_nothing_is_held(self) -> None:
        """No request, block in use or reference to an adapter, in the engine or in the service."""
        await self.until(lambda stats: self.held(stats) == ([0] * 5, [], []))
        async with asyncio.timeout(END_SECONDS):
            await self.app.admission.wait_idle()

    def held(self, stats: EngineStats) -> tuple[list[int], list[tuple[AdapterKey, int]], list[str]]:
        client = self.app.host.get(MODEL).client
        assert client is not None
        requests = [stats.num_running, stats.num_waiting, stats.num_waiting_for_adapter]
        versions = self.app.registry.list_versions(include_versions=True)
        in_use = [version.version_name for version in versions if version.num_requests]
        return [*requests, stats.used_blocks, client.requests.num_unfinished], stats.adapters, in_use


@asynccontextmanager
async def serving(launch_for: LaunchFor | None = None, **engine: int) -> AsyncIterator[Serving]:
    """`launch_for`: as for `loraplex_service.app.running`; `engine`: fields of its EngineConfig."""
    fields = {"dtype": "float32", "threads": 1, "kv_cache_bytes": 64 << 20} | engine
    model = HostedModelConfig(name=MODEL, model=str(DEMO / "models" / MODEL), **fields)  # type: ignore[arg-type]
    adapters = [AdapterConfig(name, MODEL, str(DEMO / "adapters" / name)) for name in MODELS[MODEL]]
    supervision = SupervisionConfig(
        heartbeat_seconds=0.1,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        restart_delay_seconds=0.1,
        stable_seconds=0.0,
    )
    config = ServiceConfig(
        models=(model,),
        adapters=tuple(adapters),
        adapter_roots=(str(DEMO / "adapters"),),
        supervision=supervision,
    ).with_free_ports()
    async with running(config, launch_for) as (app, addresses):
        hosted = app.host.get(MODEL)
        await hosted.wait_settled()
        assert hosted.client is not None, hosted.supervisor.error
        yield Serving(app, addresses)
