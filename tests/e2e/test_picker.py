"""Three servers, sixty adapters, a real Envoy that asks the picker, as the chart configures both."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplex import AsyncClient
from tests.e2e.conftest import DEMO, END_SECONDS, LORAPLEX, START_SECONDS, Server, running_server
from tests.e2e.test_envoy import Envoy, file_of_chart, free_ports, running_envoy
from tests.waits import MOST_SECONDS

pytestmark = pytest.mark.long

ADAPTERS = [f"tenant-{index:02d}" for index in range(60)]
SLOTS = 40  # of a server: three have room for all adapters, one has not
NEAR = ("active", "device")


@dataclass(frozen=True)
class Place:
    """Where a server listens."""

    data: int
    health: int
    metrics: int
    http: int


@contextmanager
def server_at(place: Place, directory: Path) -> Iterator[Server]:
    directory.mkdir()
    model = {"name": "storyteller", "model": str(DEMO / "models" / "storyteller"), "threads": 1}
    adapter = {"model": "storyteller", "source": str(DEMO / "adapters" / "formal")}
    with running_server(
        directory,
        listen=f"127.0.0.1:{place.data}",
        health_listen=f"127.0.0.1:{place.health}",
        metrics_listen=f"127.0.0.1:{place.metrics}",
        http_listen=f"127.0.0.1:{place.http}",
        http_hosts=["test-loraplex", "127.0.0.1"],
        models=[model | {"kv_cache_bytes": 32 << 20, "max_resident_adapters": SLOTS}],
        adapters=[adapter | {"name": name} for name in ADAPTERS],
    ) as server:
        yield server


@dataclass
class Picker:
    """A running `loraplex picker`."""

    process: subprocess.Popen[str]
    metrics: str

    def picks(self) -> dict[str, int]:
        with urllib.request.urlopen(self.metrics, timeout=MOST_SECONDS) as response:
            page = response.read().decode()
        return {place: int(float(n)) for place, n in re.findall(r'picks_total\{place="(\w+)"\} (\S+)', page)}

    async def until_it_knows(self, count: int) -> None:
        def serving() -> int:
            with urllib.request.urlopen(self.metrics, timeout=MOST_SECONDS) as response:
                found = re.search(r'replicas\{health="serving"\} (\S+)', response.read().decode())
            return int(float(found[1])) if found else 0

        async with asyncio.timeout(START_SECONDS):
            while await asyncio.to_thread(serving) != count:  # noqa: ASYNC110  (it must be asked)
                await asyncio.sleep(0.05)


@contextmanager
def picker_of(config: Path, metrics_port: int) -> Iterator[Picker]:
    process = subprocess.Popen([LORAPLEX, "picker", "--config", config], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening ")
        yield Picker(process, f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        process.kill()
        process.communicate()


@dataclass
class Fleet:
    """All of it."""

    places: Sequence[Place]
    servers: Sequence[Server]
    envoy: Envoy
    picker: Picker

    async def stream(self, client: AsyncClient, adapter: str) -> None:
        result = await client.stream_generate(adapter, "Once", max_tokens=2, ignore_eos=True).collect()
        assert result.usage.completion_tokens == 2

    def complete(self, adapter: str) -> None:
        body = json.dumps({"model": adapter, "prompt": "Once", "max_tokens": 2, "ignore_eos": True}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://{self.envoy.address}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=END_SECONDS) as response:
            assert response.headers["loraplex-adapter"].endswith(f"/{adapter}")

    async def ask(self, client: AsyncClient, adapters: Sequence[str]) -> None:
        """Every second one over HTTP."""
        for index, adapter in enumerate(adapters):
            if index % 2:
                await asyncio.to_thread(self.complete, adapter)
            else:
                await self.stream(client, adapter)


@contextmanager
def running_fleet(directory: Path) -> Iterator[Fleet]:
    ports = iter(free_ports(16))
    places = [Place(next(ports), next(ports), next(ports), next(ports)) for _ in range(3)]
    port, admin_port, picker_port, metrics_port = ports
    endpoints = [
        {"host": "127.0.0.1", "port": p.data, "healthPort": p.health, "metricsPort": p.metrics, "httpPort": p.http}
        for p in places
    ]
    local = {"enabled": True, "bindAddress": "127.0.0.1"}
    patient = {"timeoutSeconds": 2, "queue": 50}  # whatever else the machine does
    values: dict[str, Any] = {
        "models": [{"name": "storyteller", "model": "demo"}],
        "insecure": True,
        "http": {"enabled": True},
        "envoy": local | {"port": port, "adminPort": admin_port, "healthCheckSeconds": 1, "endpoints": endpoints},
        "picker": local | {"host": "127.0.0.1", "port": picker_port, "metricsPort": metrics_port} | patient,
    }
    with ExitStack() as stack:
        servers = [stack.enter_context(server_at(place, directory / str(place.data))) for place in places]
        config = file_of_chart(values, "picker", directory)
        picker = stack.enter_context(picker_of(config, metrics_port))
        config = file_of_chart(values, "envoy", directory)
        envoy = stack.enter_context(running_envoy(config, port, admin_port, directory))
        yield Fleet(places, servers, envoy, picker)


async def test_requests_go_where_their_adapter_is_and_a_dead_server_is_left(tmp_path: Path) -> None:
    with running_fleet(tmp_path) as fleet:
        await fleet.envoy.until_healthy({place.data for place in fleet.places})
        await fleet.picker.until_it_knows(3)
        async with AsyncClient(fleet.envoy.address, timeout=END_SECONDS) as client:
            await fleet.ask(client, ADAPTERS)
            first = fleet.picker.picks()
            assert sum(first.values()) == len(ADAPTERS)

            # Each adapter is somewhere now, and that is where its requests go, whichever way they come.
            weights = [1 / rank for rank in range(1, len(ADAPTERS) + 1)]
            zipf = random.Random(0).choices(ADAPTERS, weights, k=60)
            await fleet.ask(client, [*ADAPTERS, *zipf])
            second = fleet.picker.picks()
            assert {place for place, count in second.items() if count != first.get(place)} <= set(NEAR)
            assert sum(second.values()) == 2 * len(ADAPTERS) + len(zipf)

            # A server dies. No call fails: neither one that was on its way there, nor one that comes later.
            fleet.servers[0].process.kill()
            await fleet.ask(client, ADAPTERS)
            assert fleet.picker.picks().get("unknown", 0) == 0

            # The picker dies. Envoy goes by its own policy.
            fleet.picker.process.kill()
            await fleet.ask(client, ADAPTERS[:10])
