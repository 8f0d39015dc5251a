"""Engines that are killed or stopped under many streams: the streams do not notice, nor do those of other models."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from loraplex import AsyncClient
from loraplex.operations.inference import watch_health
from tests.e2e.conftest import MODELS, START_SECONDS, Server, running_server

ROUNDS = int(os.environ.get("LORAPLEX_FAULT_ROUNDS", "1"))  # of each kind of fault
HEARTBEAT_TIMEOUT_SECONDS = 3.0
TOKENS = 96
HANGING_SECONDS = 600.0  # ends what would never end; nothing here is about how fast the machine is

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Order:
    """One generation, the same whenever it is asked for."""

    model: str
    prompt: str
    seed: int | None  # None: greedy
    regex: str | None = None

    async def run(self, client: AsyncClient, begun: asyncio.Semaphore | None = None) -> tuple[list[int], str]:
        """All its tokens and its text. `begun` is released once the first have come."""
        stream = client.stream_generate(
            self.model,
            self.prompt,
            max_tokens=TOKENS,
            ignore_eos=True,
            token_ids=True,
            temperature=0.0 if self.seed is None else 1.0,
            seed=self.seed,
            regex=self.regex,
        )
        seqs = []
        async for event in stream:
            seqs.append(event.seq)
            if begun is not None and event.HasField("delta"):
                begun.release()
                begun = None
        assert seqs == list(range(len(seqs)))
        result = await stream.collect()
        assert result.usage.completion_tokens == TOKENS
        return list(result.outputs[0].token_ids), result.outputs[0].text


STRUCK = [
    Order(
        model,
        f"Tell me a story about a fox and {index} hens.",
        seed=index if index % 2 else None,
        regex="[a-z .]*" if index % 5 == 0 else None,
    )
    for index, model in enumerate(("storyteller", *MODELS["storyteller"]) * 13)
][:64]
OTHERS = [Order("json", f"What is two plus {index}?", None) for index in range(8)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Engines answer pings between steps, and these steps are short."""
    supervision = {
        "heartbeat_seconds": 0.2,
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT_SECONDS,
        "restart_delay_seconds": 0.1,
        "stable_seconds": 0.0,
        "resume_seconds": HANGING_SECONDS,
    }
    with running_server(tmp_path_factory.mktemp("resume"), supervision=supervision) as server:
        yield server


def engine_of(model: str, server: Server) -> int:
    """The pid of a model's engine. Each is told on its command line which bus is its own."""
    name = f"/{model}-".encode()
    [pid] = [pid for pid in server.engine_pids() if name in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (signal.SIGKILL, "ended with SIGKILL"),
        (signal.SIGSTOP, f"no sign of life for {HEARTBEAT_TIMEOUT_SECONDS:g} s"),
    ],
    ids=["killed", "stopped"],
)
async def test_streams_outlive_their_engine_token_by_token(
    server: Server, fault: signal.Signals, reason: str, record_property: Callable[[str, object], None]
) -> None:
    """Health turns after the configured seconds, by the server's own clock: another's is late on a busy machine."""
    delays = []
    async with AsyncClient(server.data, timeout=HANGING_SECONDS) as client:
        for name in MODELS:
            await client.wait_until_serving(f"models/{name}", timeout=START_SECONDS)
        expected = await asyncio.gather(*(order.run(client) for order in [*STRUCK, *OTHERS]))
        for _ in range(ROUNDS):
            struck, other = engine_of("storyteller", server), engine_of("quizzer", server)
            begun = asyncio.Semaphore(0)
            streams = [asyncio.create_task(order.run(client, begun)) for order in STRUCK]
            for _ in STRUCK:
                await begun.acquire()
            others = [asyncio.create_task(order.run(client)) for order in OTHERS]
            async with client._stream(watch_health("models/storyteller")) as health, asyncio.timeout(HANGING_SECONDS):
                assert (await anext(health)).value == HealthCheckResponse.SERVING
                os.kill(struck, fault)
                begin = time.monotonic()
                assert (await anext(health)).value == HealthCheckResponse.NOT_SERVING
                delays.append(round(time.monotonic() - begin, 2))
            async with asyncio.timeout(HANGING_SECONDS):
                assert await asyncio.gather(*others) == expected[len(STRUCK) :]
                assert await asyncio.gather(*streams) == expected[: len(STRUCK)]
            assert other in server.engine_pids()
            assert struck not in server.engine_pids()
    assert server.log.read_text().count(reason) == ROUNDS
    record_property("seconds_until_not_serving", sorted(delays))
