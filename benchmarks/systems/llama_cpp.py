"""llama.cpp's llama-server over HTTP, the adapter chosen per request by its `lora` field.

The GGUF files are made from the same checkpoints by `benchmarks.gguf`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import serve, take_stdout
from benchmarks.workload import Work
from loraplex_service.bench.loops import drive
from loraplex_service.bench.records import Record


class Client:
    def __init__(self, port: int, has_adapters: bool) -> None:
        self._port = port
        self._has_adapters = has_adapters

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        body: dict[str, Any] = {
            "prompt": work.prompt,
            "n_predict": work.output,
            "stream": True,
            "ignore_eos": True,
            "temperature": work.temperature,
            "top_p": work.top_p,
            "samplers": ["temperature", "top_p"],  # no others that llama.cpp has by itself
            "seed": work.seed or 0,
            "return_tokens": True,
            "cache_prompt": True,
        }
        if self._has_adapters:  # naming one sets all the others to 0; an absent field would mean all of them
            body["lora"] = [{"id": work.adapter or 0, "scale": 0.0 if work.adapter is None else 1.0}]
        tokens: list[int] = []
        async for event in self._events(body):
            new = event.get("tokens") or []
            if not event.get("stop"):
                tokens += new
                on_tokens(len(new))
            elif (missing := event["tokens_predicted"] - len(tokens)) > 0:
                on_tokens(missing)
        return tokens

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of one POST. A plain HTTP/1.1 exchange on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        data = json.dumps(body).encode()
        head = (
            f"POST /completion HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        try:
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        finally:
            writer.close()

    async def run(self, work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        return await drive(self.generate, work, concurrency)


def until_ready(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server exited with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(f"llama-server was not ready after {seconds} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with gguf/MODEL.gguf and gguf/aNN.gguf")
    parser.add_argument("--server", required=True, help="the llama-server binary")
    parser.add_argument("--gguf", required=True, help="the file's name")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    answers = take_stdout()
    gguf = args.model / "gguf"
    command = [args.server, "-m", str(gguf / args.gguf), "--host", "127.0.0.1", "--port", str(args.port), "--offline"]
    command += ["-t", str(args.threads), "-tb", str(args.threads)]
    command += ["-np", str(args.slots), "-c", str(args.max_model_len * args.slots)]
    if args.adapters:
        paths = ",".join(str(gguf / f"a{index:02d}.gguf") for index in range(args.adapters))
        command += ["--lora", paths, "--lora-init-without-apply"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=2)
    try:
        until_ready(args.port, process, 300)
        client = Client(args.port, args.adapters > 0)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.run([Work(list(range(300, 364)), 8, None)], 1))
        about = {"system": f"llama.cpp {args.gguf.split('.')[0]}", "load_seconds": time.perf_counter() - started}
        serve(client.run, about, loop, answers)
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
