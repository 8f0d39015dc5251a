"""The picker as a server, before replicas that are no more than their health and their page."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from loraplex_service.picker import page
from loraplex_service.picker.config import PickerConfig, ReplicasConfig
from loraplex_service.picker.envoy import METHOD, SERVICE, ProcessingRequest, ProcessingResponse
from loraplex_service.picker.policy import Health
from loraplex_service.picker.process import picking
from loraplex_service.ports.health import NOT_SERVING, SERVING, HealthServicer

PATIENCE = 20.0


@dataclass
class FakeReplica:
    """The doors of a server that the picker looks through."""

    ports: ReplicasConfig
    health: HealthServicer
    health_server: grpc.aio.Server
    page: str


@asynccontextmanager
async def fake_replica(data_port: int, adapter: str) -> AsyncIterator[FakeReplica]:
    health, server = HealthServicer(), grpc.aio.server()
    health.set("readiness", SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    health_port = server.add_insecure_port("127.0.0.1:0")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + replica.page.encode())
        await writer.drain()
        writer.close()

    pages = await asyncio.start_server(answer, "127.0.0.1", 0)
    await server.start()
    ports = ReplicasConfig("127.0.0.1", data_port, None, health_port, pages.sockets[0].getsockname()[1])
    page = f'vllm:lora_adapter_loaded{{adapter_name="{adapter}",level="gpu"}} 1\n'
    replica = FakeReplica(ports, health, server, page)
    async with pages:
        yield replica
    health.end()
    await server.stop(0)


@dataclass
class Fleet:
    replicas: list[FakeReplica]
    address: str
    channel: grpc.aio.Channel

    async def pick(self, adapter: str) -> list[str]:
        request = ProcessingRequest()
        for name, value in (("loraplex-adapter", adapter), ("content-type", "application/grpc")):
            request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        call: Any = self.channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )(iter([request]))
        [answer] = [each async for each in call]
        found = answer.request_headers.response.header_mutation.set_headers
        return found[0].header.raw_value.decode().split(",") if found else []

    async def until(self, is_so: Callable[[list[str]], bool], adapter: str) -> list[str]:
        async with asyncio.timeout(PATIENCE):
            while not is_so(named := await self.pick(adapter)):  # noqa: ASYNC110  (it must be asked)
                await asyncio.sleep(0.01)
        return named


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with fake_replica(1001, "poet") as first, fake_replica(1002, "legal") as second:
        config = PickerConfig(
            replicas=(first.ports, second.ports),
            listen="127.0.0.1:0",
            scrape_seconds=0.02,
            stale_seconds=1.0,
            queue=1000,
        )
        async with picking(config) as address, grpc.aio.insecure_channel(address) as channel:
            fleet = Fleet([first, second], address, channel)
            await fleet.until(lambda named: len(named) == 2, "legal")
            yield fleet


async def test_a_request_goes_where_its_adapter_is(fleet: Fleet) -> None:
    # A replica that was asked a second ago, as on a busy machine, counts as stale for a while.
    await fleet.until(lambda named: named == ["127.0.0.1:1002", "127.0.0.1:1001"], "legal")
    await fleet.until(lambda named: named == ["127.0.0.1:1001", "127.0.0.1:1002"], "poet")


async def test_a_replica_that_drains_gets_nothing_more(fleet: Fleet) -> None:
    fleet.replicas[1].health.set("readiness", NOT_SERVING)
    assert await fleet.until(lambda named: len(named) == 1, "legal") == ["127.0.0.1:1001"]


async def test_a_replica_that_is_gone_gets_nothing_more(fleet: Fleet) -> None:
    await fleet.replicas[1].health_server.stop(0)
    assert await fleet.until(lambda named: len(named) == 1, "legal") == ["127.0.0.1:1001"]


async def test_an_adapter_that_moves_takes_its_requests_with_it(fleet: Fleet) -> None:
    first, second = fleet.replicas
    first.page, second.page = second.page, first.page
    await fleet.until(lambda named: named[0] == "127.0.0.1:1002", "poet")


async def test_a_replica_of_which_nothing_new_is_heard_gets_nothing_more(fleet: Fleet) -> None:
    fleet.replicas[1].page = "x" * (5 << 20)
    assert await fleet.until(lambda named: len(named) == 1, "legal") == ["127.0.0.1:1001"]


async def test_it_is_ready_while_there_is_something_to_choose_from(fleet: Fleet) -> None:
    stub: Any = health_pb2_grpc.HealthStub(fleet.channel)
    for name in ("readiness", SERVICE):
        watch = stub.Watch(HealthCheckRequest(service=name))
        while (await watch.read()).status != HealthCheckResponse.SERVING:
            pass
        watch.cancel()
    watch = stub.Watch(HealthCheckRequest(service="readiness"))
    for replica in fleet.replicas:
        replica.health.set("readiness", NOT_SERVING)
    while (await watch.read()).status != HealthCheckResponse.NOT_SERVING:
        pass
    watch.cancel()
    assert (await stub.Check(HealthCheckRequest(service="liveness"))).status == HealthCheckResponse.SERVING


async def test_it_is_not_ready_while_it_names_none_lest_the_few_that_are_known_get_everything() -> None:
    async with fake_replica(1001, "a") as first, fake_replica(1002, "b") as second, fake_replica(1003, "c") as third:
        ports = (first.ports, second.ports, third.ports)
        config = PickerConfig(replicas=ports, listen="127.0.0.1:0", scrape_seconds=0.02, stale_seconds=0.5)
        async with (
            picking(config) as address,
            grpc.aio.insecure_channel(address) as channel,
            asyncio.timeout(PATIENCE),
        ):
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(HealthCheckRequest(service="readiness"))
            while (await watch.read()).status != HealthCheckResponse.SERVING:
                pass
            second.page = third.page = "x" * (5 << 20)
            while (await watch.read()).status != HealthCheckResponse.NOT_SERVING:
                pass
            watch.cancel()


async def test_its_own_metrics_say_what_it_chose(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    nobody = ReplicasConfig("127.0.0.1", 1, None, 1, 1)
    config = PickerConfig(replicas=(nobody,), listen="127.0.0.1:0", metrics_listen=address)
    async with picking(config) as listening, grpc.aio.insecure_channel(listening) as channel:
        assert await Fleet([], listening, channel).pick("legal") == []
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics").read().decode())
    assert 'loraplex_picker_picks_total{place="unknown"} 1.0' in page
    counts = dict(re.findall(r'loraplex_picker_replicas{health="(\w+)"} (\S+)', page))
    assert counts.keys() == {health.value for health in Health}
    assert (counts["serving"], counts["draining"]) == ("0.0", "0.0")
    assert {counts["dead"], counts["unknown"]} == {"0.0", "1.0"}


async def test_a_fault_while_a_page_is_read_does_not_end_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [KeyError("of a fault")]

    async def fetch_page(host: str, port: int) -> str:
        if faults:
            raise faults.pop()
        return await page.fetch_page(host, port)

    monkeypatch.setattr("loraplex_service.picker.replicas.fetch_page", fetch_page)
    async with fake_replica(1001, "poet") as first:
        config = PickerConfig(replicas=(first.ports,), listen="127.0.0.1:0", scrape_seconds=0.02)
        async with picking(config) as address, grpc.aio.insecure_channel(address) as channel:
            await Fleet([first], address, channel).until(lambda named: len(named) == 1, "poet")


async def test_a_host_that_can_be_no_name_does_not_hide_the_others() -> None:
    async with fake_replica(1001, "poet") as first:
        config = PickerConfig(replicas=(ReplicasConfig("x" * 64), first.ports), listen="127.0.0.1:0")
        async with picking(config) as address, grpc.aio.insecure_channel(address) as channel:
            await Fleet([first], address, channel).until(lambda named: len(named) == 1, "poet")
