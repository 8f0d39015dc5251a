"""A model over two machines, which share nothing but TCP: each has an address, a working directory and a copy of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import AsyncClient
from tests.e2e.conftest import DEMO, LORAPLEX, MODELS, START_SECONDS, Server, running_server

LEADER, WORKER = "127.0.0.1", "127.0.0.2"
NAME = "storyteller"
SECRET = "0123456789abcdef" * 4
STREAMS, TOKENS = 8, 48
HANGING_SECONDS = 300.0  # ends what would never end

pytestmark = pytest.mark.slow


class Worker:
    """The second machine, which may be started anew."""

    def __init__(self, directory: Path, port: int, secret: str, **environment: str) -> None:
        self.directory = directory
        self.port = port
        shutil.copytree(DEMO / "models" / NAME, directory / "model")
        (directory / "secret").write_text(secret)
        self.environment = (
            os.environ
            | environment
            | {
                "LWS_LEADER_ADDRESS": LEADER,
                "LWS_GROUP_SIZE": "2",
                "LWS_WORKER_INDEX": "1",
                "POD_IP": WORKER,
                "LORAPLEX_MACHINES_SECRET": str(directory / "secret"),
            }
        )
        self.command = (LORAPLEX, "follow", "--port", str(port), "--model", "model")
        self.start()

    def start(self) -> None:
        with (self.directory / "log").open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.directory, env=self.environment, stderr=log, stdin=subprocess.DEVNULL
            )

    def said(self, text: str) -> bool:
        return text in (self.directory / "log").read_text()

    def ranks(self) -> list[int]:
        pid = self.process.pid
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Worker]]:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    with socket.create_server((LEADER, 0)) as free:
        port = free.getsockname()[1]
    secret = first / "secret"
    secret.write_text(SECRET)
    model = {"name": NAME, "model": str(DEMO / "models" / NAME), "dtype": "float32", "kv_cache_bytes": 16 << 20}
    model |= {"device": "cpu", "tensor_parallel": 2, "machines": 2}
    settings: dict[str, Any] = {
        "models": [model],
        "adapters": [{"name": each, "model": NAME, "source": str(DEMO / "adapters" / each)} for each in MODELS[NAME]],
        "machines_listen": f"{LEADER}:{port}",
        "machines_secret": str(secret),
        "supervision": {
            "heartbeat_seconds": 0.2,
            "restart_delay_seconds": 0.1,
            "stable_seconds": 0.0,
            "resume_seconds": HANGING_SECONDS,
        },
    }
    with running_server(first, **settings) as server:
        worker = Worker(second, port, SECRET)
        yield server, worker
        worker.end()


async def generated(client: AsyncClient, number: int, begun: asyncio.Semaphore) -> list[int]:
    model = (NAME, *MODELS[NAME])[number % 5]
    stream = client.stream_generate(
        model, f"A story of {number} hens.", max_tokens=TOKENS, ignore_eos=True, token_ids=True, temperature=0.0
    )
    async for event in stream:
        if event.HasField("delta"):
            begun.release()
    return list((await stream.collect()).outputs[0].token_ids)


def strike(server: Server, worker: Worker, fault: str) -> None:
    if fault == "rank":
        os.kill(worker.ranks()[0], signal.SIGKILL)
    elif fault == "leader":
        os.kill(server.engine_pids().pop(), signal.SIGKILL)
    else:
        worker.end()
        worker.start()


@pytest.mark.parametrize(
    "fault", ["machine", *(pytest.param(one, marks=pytest.mark.long) for one in ("rank", "leader"))]
)
async def test_streams_outlive_what_a_machine_loses(machines: tuple[Server, Worker], fault: str) -> None:
    server, worker = machines
    async with AsyncClient(server.data, timeout=HANGING_SECONDS) as client, asyncio.timeout(HANGING_SECONDS):
        await client.wait_until_serving(f"models/{NAME}", timeout=START_SECONDS)
        begun = asyncio.Semaphore(0)
        expected = await asyncio.gather(*(generated(client, number, begun) for number in range(STREAMS)))
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(generated(client, number, begun)) for number in range(STREAMS)]
        for _ in range(STREAMS):
            await begun.acquire()
        (before,) = worker.ranks()
        strike(server, worker, fault)
        assert await asyncio.gather(*streams) == expected
        (after,) = worker.ranks()
        assert after != before


async def test_two_machines_draw_what_one_process_draws(machines: tuple[Server, Worker], tmp_path: Path) -> None:
    server, _ = machines
    model = {"name": NAME, "model": str(DEMO / "models" / NAME), "dtype": "float32", "device": "cpu"}
    adapters = [{"name": each, "model": NAME, "source": str(DEMO / "adapters" / each)} for each in MODELS[NAME]]
    found = []
    with running_server(tmp_path, models=[model], adapters=adapters) as alone:
        for address in (server.data, alone.data):
            async with AsyncClient(address, timeout=HANGING_SECONDS) as client:
                await client.wait_until_serving(f"models/{NAME}", timeout=START_SECONDS)
                begun = asyncio.Semaphore(0)
                found.append(await asyncio.gather(*(generated(client, number, begun) for number in range(STREAMS))))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("secret", "release", "here", "there"),
    [
        ("fedcba9876543210" * 4, "", "has not the secret that is here", "it has not the secret of machines_secret"),
        (SECRET, "0.0.1", "and this machine 0.0.1: install the same", "it has release 0.0.1, and this machine"),
    ],
    ids=["secret", "release"],
)
def test_a_machine_that_does_not_belong_there_is_told_so_at_both_ends(
    machines: tuple[Server, Worker], tmp_path: Path, secret: str, release: str, here: str, there: str
) -> None:
    server, worker = machines
    if release:
        installed = tmp_path / f"loraplex_server-{release}.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Name: loraplex-server\nVersion: {release}\n")
    stranger = Worker(tmp_path, worker.port, secret, PYTHONPATH=str(tmp_path))
    try:
        end = time.monotonic() + HANGING_SECONDS
        while not (stranger.said(here) and there in server.log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert stranger.process.poll() is None, "it waits on, for what the operator does"
    finally:
        stranger.end()
