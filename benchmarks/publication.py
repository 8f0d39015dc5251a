"""How long it takes from the last uploaded byte of an adapter to the first token by it, beside running streams.

    python -m benchmarks.publication --model DIR/llama-160m [--rank 320] [--count 20] [--settings JSON] --out RESULT

DIR is made by benchmarks.models. An adapter of this rank on all linears, with another number each time, is uploaded
again and again under one name to `loraplex serve`, while 8 streams of the base model run; the oldest of 4 versions is
deleted each time. None is begun after 40 s: all of it takes less than two minutes. Writes RESULT.json: the times, and
the gaps between the tokens of the streams before and meanwhile. The sender of the uploads, a process of its own, has
the cores of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc

from benchmarks.adapters_engine import ALL_TARGETS, write_weights
from benchmarks.measure import machine
from benchmarks.systems.loraplex_grpc import free_ports, server_command, until_serving
from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE
from loraplex_service.bench.records import percentile

STREAMS = 8
STREAM_TOKENS = 256
BEFORE_SECONDS = 10.0
MEANWHILE_SECONDS = 40.0  # within which publications begin
WAIT_SECONDS = 25  # for one of them
VERSIONS = 4
CHUNK_BYTES = 1 << 20
BF16_BYTES, SIGN = 2, 0x80
PROMPT = [300 + number for number in range(16)]


@dataclass
class Streams:
    """Callers of the base model, each of whom begins anew when an output has ended; and when tokens came to them."""

    client: AsyncClient
    arrivals: list[list[float]] = field(default_factory=list)  # of each output

    async def run(self) -> None:
        async def caller(number: int) -> None:
            while True:
                times: list[float] = []
                self.arrivals.append(times)
                tokens = [*PROMPT, number]
                async with self.client.stream_generate(
                    "bench", tokens, max_tokens=STREAM_TOKENS, ignore_eos=True, text=False
                ) as stream:
                    async for message in stream:
                        times += [time.perf_counter()] * message.HasField("delta")

        await asyncio.gather(*(caller(number) for number in range(STREAMS)))

    def gaps(self, since: float, until: float) -> list[float]:
        """Between tokens, of those that ended within this time."""
        return [
            after - before for times in self.arrivals for before, after in pairwise(times) if since <= after <= until
        ]


@dataclass
class Publisher:
    """Uploads versions of one adapter, of which `VERSIONS` live."""

    address: str
    client: AsyncClient
    admin: AsyncAdminClient
    config: bytes
    weights: bytearray
    versions: list[str] = field(default_factory=list)

    async def publish(self, number: int) -> dict[str, float]:
        """Upload another version and ask for a token by it. Returns seconds."""
        self.weights[-1 - number * BF16_BYTES] ^= SIGN  # of another value: each version has other content
        last = began = time.perf_counter()

        async def messages() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            nonlocal last
            adapter = adapters_pb2.Adapter(base_model="models/bench")
            header = adapters_pb2.CreateAdapterRequest(parent="tenants/shared", adapter_id="student", adapter=adapter)
            header.wait.seconds = WAIT_SECONDS
            yield adapters_pb2.UploadAdapterRequest(header=header)
            for name, content in ((CONFIG_FILE, self.config), (WEIGHTS_FILE, self.weights)):
                yield adapters_pb2.UploadAdapterRequest(
                    file=adapters_pb2.UploadFile(name=name, size_bytes=len(content))
                )
                for start in range(0, len(content), CHUNK_BYTES):
                    yield adapters_pb2.UploadAdapterRequest(chunk=bytes(content[start : start + CHUNK_BYTES]))
            last = time.perf_counter()

        async with grpc.aio.insecure_channel(self.address) as channel:
            adapter = await adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter(messages())
        assert adapter.state == adapters_pb2.Adapter.STATE_ACTIVE, adapter
        active = time.perf_counter()
        answer = await self.client.generate(adapter.version, PROMPT, max_tokens=1, text=False)
        served = time.perf_counter()
        assert answer.target.adapter_version == adapter.version
        self.versions.append(adapter.version)
        if len(self.versions) > VERSIONS:
            await self.admin.delete_adapter(self.versions.pop(0), wait=WAIT_SECONDS)
        return {"began": began, "upload": last - began, "active": active - last, "served": served - last, "end": served}


async def publish_all(address: str, admin_address: str, directory: Path, count: int) -> list[dict[str, float]]:
    """Publish one version after another."""
    config, weights = (directory / CONFIG_FILE).read_bytes(), bytearray((directory / WEIGHTS_FILE).read_bytes())
    until = time.perf_counter() + MEANWHILE_SECONDS
    runs: list[dict[str, float]] = []
    async with AsyncClient(address) as client, AsyncAdminClient(admin_address) as admin:
        publisher = Publisher(admin_address, client, admin, config, weights)
        while len(runs) < count and time.perf_counter() < until:
            runs.append(await publisher.publish(len(runs)))
    return runs


def publish_apart(address: str, admin_address: str, directory: Path, count: int) -> list[dict[str, float]]:
    """`publish_all`, in a process of its own: in that of the streams it would hold up the times of their tokens."""
    return asyncio.run(publish_all(address, admin_address, directory, count))


async def measure(address: str, admin_address: str, directory: Path, count: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        await loop.run_in_executor(apart, time.perf_counter)  # it has begun
        async with AsyncClient(address) as client:
            streams = Streams(client)
            running = asyncio.create_task(streams.run())
            await asyncio.sleep(3)
            began = time.perf_counter()
            await asyncio.sleep(BEFORE_SECONDS)
            before = streams.gaps(began, time.perf_counter())
            runs = await loop.run_in_executor(apart, publish_apart, address, admin_address, directory, count)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    during = [gap for run in runs for gap in streams.gaps(run.pop("began"), run.pop("end"))]
    return {"runs": runs, "gaps_before": _summary(before), "gaps_during": _summary(during)}


def _summary(gaps: list[float]) -> dict[str, float]:
    return {"count": len(gaps), **{f"p{share}": percentile(gaps, share / 100) for share in (50, 99)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=320)
    parser.add_argument("--count", type=int, default=20, help="at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: more of the model's configuration")
    args = parser.parse_args()
    ports = free_ports(2)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "student"
        directory.mkdir()
        shape = json.loads((args.model / "base" / "config.json").read_text())
        write_weights(shape, args.rank, 1, ALL_TARGETS, directory / WEIGHTS_FILE)
        config = {"peft_type": "LORA", "r": args.rank, "lora_alpha": args.rank, "target_modules": list(ALL_TARGETS)}
        (directory / CONFIG_FILE).write_text(json.dumps(config))
        model = {"name": "bench", "model": str((args.model / "base").resolve()), "threads": args.threads}
        settings = {"kv_cache_bytes": 1 << 29, "max_model_len": 1024, "max_adapter_rank": args.rank} | args.settings
        service: dict[str, Any] = {"listen": f"127.0.0.1:{ports[0]}", "admin_listen": f"127.0.0.1:{ports[1]}"}
        service |= {"models": [model | settings], "state_directory": f"{folder}/state"}
        file = Path(folder) / "bench.yaml"
        file.write_text(json.dumps(service))
        process = subprocess.Popen([*server_command(None), "--config", str(file)], stdout=2)
        try:
            address, admin_address = (f"127.0.0.1:{port}" for port in ports)
            asyncio.run(until_serving(address, process, 120))
            found = asyncio.run(measure(address, admin_address, directory, args.count))
        finally:
            process.terminate()
            process.wait(30)
        num_bytes = (directory / WEIGHTS_FILE).stat().st_size
    served = [run["served"] for run in found["runs"]]
    found |= {"bytes": num_bytes, "served_p50": percentile(served, 0.5), "served_p99": percentile(served, 0.99)}
    found |= {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rank": args.rank}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in found if name not in ("runs", "machine")}, indent=1))


if __name__ == "__main__":
    main()
