"""What it brings to send a request to the replica that has its adapter.

    python -m benchmarks.routing --requests 400 --rate 20 --repeats 3

Several servers, each with fewer slots for adapters and less memory than there are adapters, behind the real Envoy with
the chart's configuration. The same requests, Poisson in time and Zipf in their adapters, go through it once with each
policy, each time to new servers: `picker` asks the endpoint picker, `ring` hashes the adapter's name with bounded load,
`turns` takes one replica after the other. As medians of the repeats: the share of requests whose adapter did not have
to be brought to the device, the reads from disk, the time to the first token. It begins once each server has
read every adapter.

Servers, Envoy, picker and client share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

from benchmarks.measure import machine
from benchmarks.systems.loraplex_grpc import free_ports
from loraplex import AsyncClient
from loraplex_service.bench.records import percentile

POLICIES = ("picker", "ring", "turns")
BESIDE = Path(sys.executable).parent
CHART = Path(__file__).resolve().parents[1] / "helm" / "loraplex"
DEMO = Path(__file__).resolve().parents[1] / "demo" / "loraplex_demo"
START_SECONDS = 120.0
PROMPT = "Once upon a time"
OUTPUT_TOKENS = 16
_MOVE = re.compile(r'loraplex_adapter_moves_total\{from="\w+",model="\w+",to="device"\} (\S+)')
_READ = re.compile(r'loraplex_adapter_loads_total\{model="\w+"\} (\S+)')


@dataclass(frozen=True)
class Replica:
    """The ports of one server."""

    data: int
    health: int
    metrics: int

    def count(self, sample: re.Pattern[str]) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=30) as response:
            return sum(float(value) for value in sample.findall(response.read().decode()))


@contextmanager
def process(command: Sequence[str], log: Path, first_line: bool = True) -> Iterator[None]:
    """A program that runs for the length of the block, and says on its first line that it is ready."""
    with log.open("w") as errors:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert running.stdout is not None
        if first_line and not running.stdout.readline():
            raise RuntimeError(f"{command[0]} ended: {log.read_text()}")
        yield
    finally:
        running.kill()
        running.communicate()


@contextmanager
def running_replica(args: argparse.Namespace, folder: Path) -> Iterator[Replica]:
    data, admin, health, metrics = free_ports(4)
    folder.mkdir(parents=True)
    model = {
        "name": "bench",
        "model": str(args.model.resolve()),
        "threads": 1,
        "kv_cache_bytes": 64 << 20,
        "max_resident_adapters": args.slots,
        "adapter_host_bytes": args.host_bytes,
    }
    adapters = [
        {"name": f"a{number:02d}", "model": "bench", "source": str(args.adapter.resolve())}
        for number in range(args.adapters)
    ]
    config = {
        "listen": f"127.0.0.1:{data}",
        "admin_listen": f"127.0.0.1:{admin}",
        "health_listen": f"127.0.0.1:{health}",
        "metrics_listen": f"127.0.0.1:{metrics}",
        "adapter_roots": [str(args.adapter.resolve().parent)],
        "models": [model],
        "adapters": adapters,
        "state_directory": "",
    }
    file = folder / "loraplex.yaml"
    file.write_text(json.dumps(config))
    with process([str(BESIDE / "loraplex"), "serve", "--config", str(file)], folder / "log"):
        yield Replica(data, health, metrics)


def configurations(policy: str, replicas: Sequence[Replica], ports: Sequence[int], folder: Path) -> dict[str, Path]:
    """The files of Envoy and of the picker, as the chart writes them; for `turns` with another policy."""
    port, admin_port, picker_port, metrics_port = ports
    endpoints = [
        {"host": "127.0.0.1", "port": one.data, "healthPort": one.health, "metricsPort": one.metrics}
        for one in replicas
    ]
    local = {"enabled": True, "bindAddress": "127.0.0.1"}
    picker = local | {"host": "127.0.0.1", "port": picker_port, "metricsPort": metrics_port}
    values: dict[str, Any] = {
        "models": [{"name": "bench", "model": "bench"}],
        "insecure": True,
        "envoy": local | {"port": port, "adminPort": admin_port, "healthCheckSeconds": 1, "endpoints": endpoints},
        "picker": picker | {"enabled": policy == "picker"},
    }
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="bench")
    files = {}
    for name in ("envoy", "picker"):
        documents = yaml.safe_load_all(rendered.get(f"loraplex/templates/{name}.yaml", ""))
        for document in (each for each in documents if each and each["kind"] == "ConfigMap"):
            files[name] = folder / f"{name}.yaml"
            files[name].write_text(document["data"][f"{name}.yaml"])
    if policy == "turns":
        _take_turns(files["envoy"])
    return files


def _take_turns(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    for cluster in config["static_resources"]["clusters"]:
        cluster["lb_policy"] = "ROUND_ROBIN"
        del cluster["ring_hash_lb_config"], cluster["common_lb_config"]["consistent_hashing_lb_config"]
    file.write_text(yaml.safe_dump(config))


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > START_SECONDS:
            raise RuntimeError(f"{what} is not so after {START_SECONDS:g} s")
        time.sleep(0.1)


def num_healthy(admin_port: int) -> int:
    """How many replicas Envoy has found healthy."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/clusters?format=json", timeout=5) as response:
            clusters = {each["name"]: each for each in json.load(response)["cluster_statuses"]}
    except OSError:
        return 0
    hosts = clusters.get("replicas", {}).get("host_statuses", [])
    return sum(not host["health_status"].get("failed_active_health_check") for host in hosts)


async def first_tokens(address: str, args: argparse.Namespace, seed: int) -> list[float]:
    """Send the requests at their moments; the seconds that each waited for its first token."""
    rng = random.Random(seed)
    weights = [1 / rank**args.zipf for rank in range(1, args.adapters + 1)]
    adapters = rng.choices([f"a{number:02d}" for number in range(args.adapters)], weights, k=args.requests)
    moments = itertools.accumulate(rng.expovariate(args.rate) for _ in adapters)
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.1

    async with AsyncClient(address, timeout=120) as client:

        async def one(adapter: str, moment: float) -> float:
            await asyncio.sleep(began + moment - loop.time())
            sent, first = loop.time(), None
            stream = client.stream_generate(adapter, PROMPT, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            async for message in stream:
                if first is None and message.WhichOneof("event") == "delta":
                    first = loop.time() - sent
            return float("nan") if first is None else first

        return await asyncio.gather(*(one(*each) for each in zip(adapters, moments, strict=True)))


def measured(policy: str, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """One run of one policy."""
    ports = free_ports(4)
    with ExitStack() as stack:
        replicas = [stack.enter_context(running_replica(args, folder / str(number))) for number in range(args.replicas)]
        files = configurations(policy, replicas, ports, folder)
        if policy == "picker":
            command = [str(BESIDE / "loraplex"), "picker", "--config", str(files["picker"])]
            stack.enter_context(process(command, folder / "picker.log"))
        envoy = shutil.which("envoy", path=str(BESIDE)) or "envoy"
        command = [envoy, "--config-path", str(files["envoy"]), "--use-dynamic-base-id", "--log-level", "error"]
        stack.enter_context(process(command, folder / "envoy.log", first_line=False))
        wait_until(lambda: num_healthy(ports[1]) == len(replicas), "that all replicas serve")
        # They serve while they still read the adapters of their configuration, which is no part of what is measured.
        wait_until(lambda: all(one.count(_READ) >= args.adapters for one in replicas), "that all adapters were read")
        before = [[replica.count(sample) for replica in replicas] for sample in (_MOVE, _READ)]
        waits = asyncio.run(first_tokens(f"127.0.0.1:{ports[0]}", args, seed))
        after = [[replica.count(sample) for replica in replicas] for sample in (_MOVE, _READ)]
    moves, reads = (sum(then) - sum(now) for now, then in zip(before, after, strict=True))
    return {
        "hit_rate": 1 - moves / args.requests,
        "reads": reads,
        "ttft_p50_ms": 1e3 * percentile(waits, 0.5),
        "ttft_p99_ms": 1e3 * percentile(waits, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "models" / "storyteller")
    parser.add_argument("--adapter", type=Path, default=DEMO / "adapters" / "shouting", help="of which all are copies")
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--slots", type=int, default=24, help="for adapters, on each replica")
    parser.add_argument("--host-bytes", type=int, default=8 << 20, help="for adapters, in each one's host memory")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for policy in POLICIES:  # in turns, with the same requests
                results[policy].append(measured(policy, args, repeat, Path(folder) / f"{policy}-{repeat}"))
    medians = {
        policy: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for policy, runs in results.items()
    }
    print(json.dumps({"machine": machine(), "command": " ".join(sys.argv), "medians": medians}, indent=2))


if __name__ == "__main__":
    main()
