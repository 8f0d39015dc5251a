"""A thousand callers leave in the middle of their streams, by both doors and in every way: nothing of them stays."""

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex import AsyncClient, AsyncGenerateStream
from tests.e2e.conftest import END_SECONDS, MODELS, Server, running_server
from tests.faults.memory import anonymous_mib
from tests.faults.traffic import read_page
from tests.service.http.clients.environments import needs_uvicorn

LEAVING: Final = 1000
WARMING_UP: Final = 200  # that leave before anything is measured: pools, caches and connections are there then
AT_ONCE: Final = 20
HEARD: Final = 3  # messages that each has when it leaves
TOKENS: Final = 1900  # that each would have had
MOST_MIB: Final = 64.0  # by which a process may have grown
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: what was not read is thrown away, and the other side told so

# What is 0, or not there, while nobody calls.
AT_REST: Final = {
    "loraplex_in_flight_sequences",
    "loraplex_running_requests",
    "loraplex_waiting_requests",
    "loraplex_waiting_for_adapter_requests",
    "loraplex_kv_cache_usage_ratio",
    "loraplex_adapter_requests",
    "loraplex_usage_records_waiting",
}
ENDED: Final = "loraplex_tenant_requests_total "
LASTING: Final = {"--bus", "loraplex_service.http"}  # in the commands of processes that last as long as the service
TARGETS: Final = ("storyteller", *MODELS["storyteller"], "quizzer", *MODELS["quizzer"])
ENDLESS: Final = {"stream": True, "loraplex": {"stopping": {"ignoreEos": True}}}
SAID: Final = [{"role": "user", "content": "A fox"}]
BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": ENDLESS | {"prompt": "A fox", "max_tokens": TOKENS},
    "/v1/chat/completions": ENDLESS | {"messages": SAID, "max_tokens": TOKENS},
    "/v1/responses": ENDLESS | {"input": "A fox", "max_output_tokens": TOKENS},
    "/v1/messages": ENDLESS | {"messages": SAID, "max_tokens": TOKENS},
}

pytestmark = [pytest.mark.slow, needs_uvicorn]


class Figures(NamedTuple):
    """What a server says of itself, and what the kernel says of its processes."""

    left: float  # generations that ended because their caller was gone
    held: dict[str, float]  # what is not 0 of that which is so while nobody calls
    open_files: dict[str, float]  # by process
    mib: dict[int, float]  # by process

    @classmethod
    def of(cls, server: Server) -> "Figures":
        page = text_string_to_metric_families(read_page(server))
        named = [(f"{each.name} {each.labels}", each) for family in page for each in family.samples]
        cancelled = [each for name, each in named if name.startswith(ENDED) and each.labels["status"] == "CANCELLED"]
        pids = [server.process.pid, *(pid for pid, command in server.children() if LASTING.intersection(command))]
        return cls(
            sum(each.value for each in cancelled),
            {name: each.value for name, each in named if each.name in AT_REST and each.value},
            {name: each.value for name, each in named if each.name == "loraplex_process_open_files"},
            {pid: anonymous_mib(pid) for pid in pids},
        )


async def once_left(server: Server, left: float, open_files: dict[str, float]) -> Figures:
    """The figures once so many have left and nothing of them is there; where that never comes, the last ones."""
    with suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            while True:
                now = await asyncio.to_thread(Figures.of, server)
                if not now.held and now.left >= left and (not open_files or now.open_files == open_files):
                    break
                await asyncio.sleep(0.2)
    return now


# ---- ways to leave ---------------------------------------------------------------------------------------------------


async def leave_http(server: Server, path: str, reset: bool, target: str) -> None:
    """Close a connection, in an orderly way or not."""
    host, _, port = str(server.http).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(BODIES[path] | {"model": target}).encode()
    headers = {"host": host, "content-type": "application/json", "content-length": len(body)}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    assert b" 200 " in await reader.readline()
    for _ in range(HEARD):
        await reader.readuntil(b"\ndata: ")
    if reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def begun(client: AsyncClient, target: str) -> AsyncGenerateStream:
    """A stream of which some has come."""
    stream = client.stream_generate(target, "A fox", max_tokens=TOKENS, ignore_eos=True)
    for _ in range(HEARD):
        await anext(stream)
    return stream


async def cancel(client: AsyncClient, target: str) -> None:
    (await begun(client, target)).cancel()


async def close_channel(server: Server, target: str) -> None:
    async with AsyncClient(server.data) as client:
        await begun(client, target)


async def leave(server: Server, client: AsyncClient, times: int) -> None:
    """Have so many leave, some at a time, each in another way than the one before and from another target."""
    orderly, cut = ([partial(leave_http, server, path, reset) for path in BODIES] for reset in (False, True))
    over_grpc = [partial(cancel, client), partial(close_channel, server)] * len(BODIES)
    ways: itertools.cycle[Callable[[str], Awaitable[None]]] = itertools.cycle([*orderly, *cut, *over_grpc])
    targets = itertools.cycle(TARGETS)

    async def one_after_another(number: int) -> None:
        for _ in range(number):
            await next(ways)(next(targets))

    await asyncio.gather(*(one_after_another(times // AT_ONCE) for _ in range(AT_ONCE)))


async def test_a_thousand_that_leave_in_mid_stream_leave_nothing_behind(tmp_path: Path) -> None:
    """Requests, places, adapters, blocks of the cache, descriptors, memory: all as they were."""
    ports = {"http_listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
    with running_server(tmp_path, **ports) as server:
        async with AsyncClient(server.data, timeout=END_SECONDS) as client:
            for name in MODELS:
                await client.wait_until_serving(f"models/{name}")
            await leave(server, client, WARMING_UP)
            before = await once_left(server, WARMING_UP, {})
            await leave(server, client, LEAVING)
            after = await once_left(server, WARMING_UP + LEAVING, before.open_files)
        assert before.left == WARMING_UP
        assert after.left == WARMING_UP + LEAVING
        assert before.held == after.held == {}
        assert after.open_files == before.open_files
        grown = {pid: mib - before.mib[pid] for pid, mib in after.mib.items()}
        print(f"MiB by which each process grew: {grown}")
        assert max(grown.values()) < MOST_MIB
        assert server.terminate() == 0
        assert "Traceback" not in server.log.read_text()
