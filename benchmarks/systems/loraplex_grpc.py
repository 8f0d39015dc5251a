"""A Loraplex server as its users meet it: `loraplex serve`, one stream per request, over gRPC by the generated stubs.

With --http its port that speaks OpenAI's API gets the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from benchmarks.measure import cpu_seconds_of, process_tree
from benchmarks.systems.http_client import HttpClient
from benchmarks.worker import form_of, serve, take_stdout
from benchmarks.workload import Work
from loraplex.v1 import generation_pb2, inference_pb2, inference_pb2_grpc, prompt_pb2
from loraplex_engine.link.config import QUANTIZATIONS
from loraplex_service.bench.loops import drive
from loraplex_service.bench.records import Record


def write_config(folder: Path, args: argparse.Namespace, ports: Sequence[int]) -> Path:
    """A service configuration with one model and its adapters. JSON is YAML."""
    model = {
        "name": "bench",
        "model": str((args.model / args.base).resolve()),
        "kernels": args.kernels,
        "threads": args.threads,
        "max_model_len": args.max_model_len,
        "kv_cache_bytes": args.kv_cache_bytes,
        "quantization": args.quantization,
    }
    adapters = [
        {
            "name": f"a{index:02d}",
            "model": "bench",
            "source": str((args.model / "adapters" / f"a{index:02d}").resolve()),
        }
        for index in range(args.adapters)
    ]
    config = {
        "listen": f"127.0.0.1:{ports[0]}",
        "admin_listen": f"127.0.0.1:{ports[1]}",
        "http_listen": f"127.0.0.1:{ports[2]}" if args.http else None,
        "adapter_roots": [str((args.model / "adapters").resolve())] if adapters else [],
        "models": [model],
        "adapters": adapters,
    } | args.settings
    path = folder / "bench.yaml"
    path.write_text(json.dumps(config))
    return path


class Client:
    """One channel, many streams."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub | None = None

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        if self._stub is None:  # on the loop that will use it
            self._stub = inference_pb2_grpc.InferenceServiceStub(grpc.aio.insecure_channel(self._address))
        spec = generation_pb2.GenerateSpec(
            model="bench" if work.adapter is None else f"a{work.adapter:02d}",
            prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=work.prompt)),
            sampling=generation_pb2.Sampling(temperature=work.temperature, top_p=work.top_p, seed=work.seed),
            stopping=generation_pb2.Stopping(max_tokens=work.output, ignore_eos=True),
            output=generation_pb2.OutputOptions(text=True, token_ids=True),
        )
        tokens: list[int] = []
        completed = False
        async for event in self._stub.StreamGenerate(inference_pb2.StreamGenerateRequest(spec=spec)):
            if event.HasField("delta"):
                new = event.delta.token_ids
                tokens.extend(new)
                on_tokens(len(new))
            completed = completed or event.HasField("completed")
        if not completed:
            raise RuntimeError("the stream ended without Completed")
        return tokens

    async def run(self, work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        return await drive(self.generate, work, concurrency)


def free_ports(count: int) -> list[int]:
    import socket

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


async def until_serving(address: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    deadline = time.perf_counter() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
        )
        while time.perf_counter() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"loraplex serve exited with {process.returncode}")
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await check(HealthCheckRequest(service="models/bench"), timeout=1)
                if answer.status == HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.05)
    raise TimeoutError(f"loraplex serve was not ready after {seconds} seconds")


def server_command(steps_per_second: float | None) -> list[str]:
    if steps_per_second is None:
        return [os.path.join(os.path.dirname(sys.executable), "loraplex"), "serve"]
    module = "benchmarks.systems.loraplex_frontend"
    return [sys.executable, "-m", module, "--steps-per-second", str(steps_per_second)]


def cpu_by_part(service: int) -> dict[str, float]:
    """CPU seconds of this process, of the service's own, of its HTTP process, and of its engine (with the template
    worker).
    """
    http = [pid for pid in process_tree(service) if "loraplex_service.http" in command_of(pid)]
    return {
        "client": cpu_seconds_of([os.getpid()]),
        "service": cpu_seconds_of([service]),
        "http": cpu_seconds_of(http),
        "engine": cpu_seconds_of(set(process_tree(service)) - {service, *http}),
    }


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    parser.add_argument("--base", default="base", help="in it: a directory, or a file of benchmarks.gguf")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the base model, while it is loaded")
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: more of the configuration")
    parser.add_argument("--steps-per-second", type=float, help="of a token source in place of the engine")
    parser.add_argument("--http", action="store_true", help="send the requests to the HTTP port")
    args = parser.parse_args()
    answers = take_stdout()
    started = time.perf_counter()
    ports = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), args, ports)
        process = subprocess.Popen([*server_command(args.steps_per_second), "--config", str(config)], stdout=2)
        try:
            loop = asyncio.new_event_loop()
            address = f"127.0.0.1:{ports[0]}"
            loop.run_until_complete(until_serving(address, process, 120))
            client = HttpClient("127.0.0.1", ports[2]) if args.http else Client(address)
            warm_up = [Work([300 + i] * 16, 2, i) for i in range(args.adapters)] or [Work([300] * 16, 2, None)]
            loop.run_until_complete(client.run(warm_up, 8))
            kind = f"Loraplex over {'HTTP' if args.http else 'gRPC'}"
            about = {
                "system": " ".join(filter(None, [kind, form_of(args)])),
                "load_seconds": time.perf_counter() - started,
            }
            serve(client.run, about, loop, answers, lambda: cpu_by_part(process.pid))
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    main()
