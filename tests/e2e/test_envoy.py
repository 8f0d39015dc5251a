"""Several servers behind a real Envoy, configured as the chart configures it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from loraplex import AsyncClient, LoraplexError
from tests.e2e.conftest import DEMO, END_SECONDS, START_SECONDS, Server, running_server
from tests.envoy import envoy as envoy_program
from tests.service.ports.http2_caller import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Http2Caller,
    call_headers,
    frame,
    message,
)
from tests.waits import MOST_SECONDS

CHART = Path(__file__).resolve().parents[2] / "helm" / "loraplex"
ADAPTERS = [f"tenant-{index:02d}" for index in range(20)]
BALANCE_FACTOR = 150  # the chart's default, in percent of the mean load

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Place:
    """Where a server listens, or will."""

    data: int
    health: int


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def places(count: int) -> list[Place]:
    ports = free_ports(2 * count)
    return [Place(data, health) for data, health in zip(ports[:count], ports[count:], strict=True)]


@contextmanager
def server_at(place: Place, directory: Path) -> Iterator[Server]:
    """One tiny model, twenty adapters, on the ports that Envoy knows."""
    directory.mkdir()
    model = {"name": "storyteller", "model": str(DEMO / "models" / "storyteller"), "threads": 1}
    adapter = {"model": "storyteller", "source": str(DEMO / "adapters" / "formal")}
    with running_server(
        directory,
        listen=f"127.0.0.1:{place.data}",
        health_listen=f"127.0.0.1:{place.health}",
        models=[model | {"kv_cache_bytes": 32 << 20}],
        adapters=[adapter | {"name": name} for name in ADAPTERS],
        lame_duck_seconds=3.0,  # two health checks of Envoy's, and a little
        drain_grace_seconds=END_SECONDS,
    ) as server:
        yield server


class Envoy:
    """A running Envoy in front of some places, some of which may be empty yet."""

    def __init__(self, port: int, admin_port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._admin = f"http://127.0.0.1:{admin_port}"

    def _hosts(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self._admin}/clusters?format=json", timeout=MOST_SECONDS) as response:
            [cluster] = [each for each in json.load(response)["cluster_statuses"] if each["name"] == "replicas"]
        hosts: list[dict[str, Any]] = cluster.get("host_statuses", [])
        return hosts

    def counts(self, stat: str) -> dict[int, int]:
        """One of Envoy's statistics, by the port of the server."""
        found = {}
        for host in self._hosts():
            stats = {each["name"]: int(each.get("value", 0)) for each in host["stats"]}
            found[host["address"]["socket_address"]["port_value"]] = stats[stat]
        return found

    def healthy(self) -> set[int]:
        return {
            host["address"]["socket_address"]["port_value"]
            for host in self._hosts()
            if not host["health_status"].get("failed_active_health_check")
        }

    async def until_healthy(self, ports: set[int]) -> None:
        async with asyncio.timeout(START_SECONDS):
            while await asyncio.to_thread(self.healthy) != ports:  # noqa: ASYNC110  (Envoy must be asked)
                await asyncio.sleep(0.1)


@contextmanager
def envoy_before(servers: Sequence[Place], directory: Path, **envoy: object) -> Iterator[Envoy]:
    """envoy: more of the chart's values for it."""
    port, admin_port = free_ports(2)
    values: dict[str, Any] = {
        "models": [{"name": "storyteller", "model": "demo"}],
        "insecure": True,
        "envoy": {
            "enabled": True,
            "bindAddress": "127.0.0.1",
            "port": port,
            "adminPort": admin_port,
            "healthCheckSeconds": 1,
            "balanceFactor": BALANCE_FACTOR,
            "endpoints": [{"host": "127.0.0.1", "port": p.data, "healthPort": p.health} for p in servers],
            **envoy,
        },
    }
    with running_envoy(file_of_chart(values, "envoy", directory), port, admin_port, directory) as running:
        yield running


def file_of_chart(values: dict[str, Any], name: str, directory: Path) -> Path:
    """The configuration file NAME.yaml of the chart's template of that name, written down."""
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="test")[f"loraplex/templates/{name}.yaml"]
    [config_map] = [each for each in yaml.safe_load_all(rendered) if each["kind"] == "ConfigMap"]
    file = directory / f"{name}.yaml"
    file.write_text(config_map["data"][f"{name}.yaml"])
    return file


@contextmanager
def running_envoy(config: Path, port: int, admin_port: int, directory: Path) -> Iterator[Envoy]:
    command = [envoy_program(), "--config-path", str(config), "--use-dynamic-base-id", "--concurrency", "1"]
    log = directory / "envoy.log"
    with log.open("w") as log_file:
        process = subprocess.Popen([*command, "--log-level", "warning"], stderr=log_file)
    try:
        yield wait_for_admin(Envoy(port, admin_port), process, log)
    finally:
        process.terminate()
        process.wait(END_SECONDS)


def wait_for_admin(envoy: Envoy, process: subprocess.Popen[bytes], log: Path) -> Envoy:
    while process.poll() is None:
        try:
            envoy.healthy()
        except OSError:
            time.sleep(0.02)  # Envoy tells nobody, one must ask
        else:
            return envoy
    raise AssertionError(f"envoy ended: {log.read_text()}")


@dataclass
class Load:
    """Callers that stream one generation after the other through Envoy, each with an adapter of its own."""

    client: AsyncClient
    finished: int = 0
    failures: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Queue[None] = field(default_factory=asyncio.Queue)

    async def caller(self, adapter: str) -> None:
        while not self.stop.is_set():
            try:
                await generate(self.client, adapter, 24)
            except LoraplexError as error:
                self.failures.append(f"{adapter}: {error}")
            else:
                self.finished += 1
            self.ended.put_nowait(None)

    async def until_more(self, count: int) -> None:
        """Until so many generations more have ended, well or not."""
        while not self.ended.empty():
            self.ended.get_nowait()
        async with asyncio.timeout(END_SECONDS):
            for _ in range(count):
                await self.ended.get()


async def generate(client: AsyncClient, adapter: str, tokens: int) -> None:
    stream = client.stream_generate(adapter, "Once", max_tokens=tokens, ignore_eos=True, routing_key=adapter)
    result = await stream.collect()
    assert result.usage.completion_tokens == tokens


@asynccontextmanager
async def load_on(envoy: Envoy, callers: int) -> AsyncIterator[Load]:
    async with AsyncClient(envoy.address, timeout=END_SECONDS) as client:
        load = Load(client)
        async with asyncio.TaskGroup() as group:
            for adapter in ADAPTERS[:callers]:
                group.create_task(load.caller(adapter))
            try:
                yield load
            finally:
                load.stop.set()


async def test_two_servers_are_replaced_under_load_without_one_failed_call(tmp_path: Path) -> None:
    old, new = places(2), places(2)
    with ExitStack() as stack:
        envoy = stack.enter_context(envoy_before([*old, *new], tmp_path))
        leaving = [stack.enter_context(server_at(place, tmp_path / f"old-{index}")) for index, place in enumerate(old)]
        await envoy.until_healthy({place.data for place in old})
        async with load_on(envoy, callers=6) as load:
            await load.until_more(20)
            serving = {place.data for place in old}
            for index, server in enumerate(leaving):
                replacement = await asyncio.to_thread(
                    stack.enter_context, server_at(new[index], tmp_path / f"new-{index}")
                )
                assert replacement.process.poll() is None
                serving |= {new[index].data}
                await envoy.until_healthy(serving)
                assert await asyncio.to_thread(server.terminate) == 0
                serving -= {old[index].data}
                await load.until_more(20)
            assert await asyncio.to_thread(envoy.healthy) == {place.data for place in new}
        assert load.failures == []
        assert load.finished >= 60


async def test_adapters_stay_on_their_server_a_hot_one_spreads_and_a_dead_one_is_left(tmp_path: Path) -> None:
    at = places(3)
    ports = {place.data for place in at}
    with ExitStack() as stack:
        servers = {place.data: stack.enter_context(server_at(place, tmp_path / str(place.data))) for place in at}
        envoy = stack.enter_context(envoy_before(at, tmp_path))
        await envoy.until_healthy(ports)
        async with AsyncClient(envoy.address, timeout=END_SECONDS) as client:
            homes: dict[str, int] = {}
            for adapter in ADAPTERS:
                before = envoy.counts("rq_total")
                for _ in range(3):
                    await generate(client, adapter, 2)
                after = envoy.counts("rq_total")
                [homes[adapter]] = [port for port in ports if after[port] != before[port]]
            assert set(homes.values()) == ports  # twenty over three: none is left out

            # One adapter, many at once: no server gets more than its bound, while each has as much as the others do.
            streams = [
                client.stream_generate("tenant-00", "Once", max_tokens=400, ignore_eos=True, routing_key="tenant-00")
                for _ in range(30)
            ]
            await asyncio.gather(*(anext(stream) for stream in streams))
            active = envoy.counts("rq_active")
            assert sum(active.values()) == 30
            assert max(active.values()) <= 30 / 3 * BALANCE_FACTOR / 100 + 1
            assert active[homes["tenant-00"]] == max(active.values())
            for stream in streams:
                stream.cancel()

            # The dead server's adapters move at once, before any health check has noticed; the others stay.
            dead = homes["tenant-00"]
            servers[dead].process.kill()
            moved = Counter[str]()
            for adapter in ADAPTERS:
                before = envoy.counts("rq_success")
                await generate(client, adapter, 2)
                after = envoy.counts("rq_success")
                [home] = [port for port in ports if after[port] != before[port]]
                assert home != dead
                moved[adapter] += home != homes[adapter]
            assert {adapter for adapter in moved if moved[adapter]} == {a for a in ADAPTERS if homes[a] == dead}


async def test_an_address_that_calls_too_often_is_refused_before_the_servers_and_others_are_not(tmp_path: Path) -> None:
    [place], a_second = places(1), 20
    with ExitStack() as stack:
        stack.enter_context(server_at(place, tmp_path / "server"))
        envoy = stack.enter_context(envoy_before([place], tmp_path, callsPerSecondPerAddress=a_second))
        await envoy.until_healthy({place.data})
        started = time.monotonic()
        for _ in range(5):
            with Http2Caller(envoy.address, source="127.0.0.2") as stranger:
                await asyncio.to_thread(call_and_wait, stranger, 100)
        passed = envoy.counts("rq_total")[place.data]
        assert 2 * a_second <= passed <= 2 * a_second + a_second * (time.monotonic() - started + 1) < 500
        async with AsyncClient(envoy.address, timeout=END_SECONDS) as client:
            for _ in range(a_second):
                await client.tokenize("storyteller", "A fox")


def call_and_wait(caller: Http2Caller, count: int) -> None:
    """So many calls at once, until each has been answered or refused."""
    headers, empty = call_headers("/loraplex.v1.InferenceService/Generate"), message(b"")
    calls = [
        frame(HEADERS, END_HEADERS, stream, headers) + frame(DATA, END_STREAM, stream, empty)
        for stream in caller.streams(count)
    ]
    caller.send(b"".join(calls))
    caller.until(HEADERS, count)
