"""Many adapters, more hot ones than the device holds, and bad neighbours: what each costs everybody else.

    python -m benchmarks.adapters --model DIR/llama-160m --out RESULT [--parts many hot bad]

DIR is made by benchmarks.models. Adapters of ranks 8 to 64 on q and v are written to a temporary directory. The engine
runs in this process; its configuration is what `Setup` says, all else is default. Writes RESULT.json, .md and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.key import AdapterKey
from adapters.source import CONFIG_FILE, WEIGHTS_FILE, digest
from benchmarks.adapters_report import write_report
from benchmarks.measure import Record, closed_loop, machine, percentile, summarise
from benchmarks.workload import FIRST_TOKEN_ID, SEED, VOCAB, Work
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddRequest, LoadAdapter, StepOutput
from engine.sampling_params import SamplingParams

RANKS = (8, 16, 32, 64)
FILES_PER_RANK = 8  # the files of further adapters are links to these, under configurations of their own
COUNTS = (5, 50, 500, 2000)
ZIPF = 1.0
HOST_BYTES = 12 << 30


@dataclass(frozen=True)
class Setup:
    """The engine of one part."""

    num_adapters: int
    max_resident: int = 256


# ---- adapters on the disk --------------------------------------------------------------------------------------------


def write_weights(model: dict[str, Any], rank: int, seed: int, targets: Sequence[str], file: Path) -> None:
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    kv = hidden // heads * model["num_key_value_heads"]
    outputs = {"q_proj": hidden, "v_proj": kv, "k_proj": kv, "o_proj": hidden}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name in targets:
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            a = torch.randn(rank, hidden, generator=generator) / hidden**0.5
            b = torch.randn(outputs[name], rank, generator=generator) * 0.05 / rank**0.5
            tensors[f"{module}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{module}.lora_B.weight"] = b.to(torch.bfloat16)
    save_file(tensors, file)


def write_adapters(model: dict[str, Any], count: int, root: Path) -> list[Path]:
    weights: dict[tuple[int, int], Path] = {}
    for rank in RANKS:
        for number in range(FILES_PER_RANK):
            weights[rank, number] = root / f"r{rank}-{number}.safetensors"
            write_weights(model, rank, 100 * rank + number, ("q_proj", "v_proj"), weights[rank, number])
    paths = []
    for index in range(count):
        rank = RANKS[index % len(RANKS)]
        path = root / f"a{index:04d}"
        path.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank + index / 4096, "target_modules": ["q_proj"]}
        (path / CONFIG_FILE).write_text(json.dumps(config))
        os.link(weights[rank, index // len(RANKS) % FILES_PER_RANK], path / WEIGHTS_FILE)
        paths.append(path)
    return paths


# ---- an engine and its callers ---------------------------------------------------------------------------------------


class Bench:
    """An engine in this process, stepped while somebody waits."""

    def __init__(self, model: Path, setup: Setup, threads: int, root: Path) -> None:
        shape = json.loads((model / "base" / "config.json").read_text())
        self.shape = shape
        self.paths = write_adapters(shape, setup.num_adapters, root)
        self.keys = [AdapterKey(f"shared/{path.name}", digest(path)) for path in self.paths]
        config = EngineConfig(
            model=str(model / "base"),
            threads=threads,
            max_model_len=512,
            max_num_seqs=64,
            kv_cache_bytes=512 << 20,
            max_resident_adapters=setup.max_resident,
            adapter_device_bytes=4 << 30,
            adapter_host_bytes=HOST_BYTES,
            enable_prefix_caching=False,
        )
        self.core = EngineCore.load(config)
        self._next_id = 0
        self._waiting: dict[int, tuple[Callable[[int], None], asyncio.Future[bool]]] = {}

    def close(self) -> None:
        self.core.close()

    def load_all(self) -> float:
        """Register every adapter and wait until all are in host memory. Seconds."""
        began = time.perf_counter()
        for key, path in zip(self.keys, self.paths, strict=True):
            self.core.load_adapter(LoadAdapter(key, str(path)))
        while self.core.has_work():
            self.core.step()
            time.sleep(0.002)
        return time.perf_counter() - began

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        await self.request(work, on_tokens)
        return []

    async def request(self, work: Work, on_tokens: Callable[[int], None]) -> bool:
        """False: it failed."""
        self._next_id += 1
        ended = asyncio.get_running_loop().create_future()
        self._waiting[self._next_id] = (on_tokens, ended)
        sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=work.output)
        adapter = None if work.adapter is None else self.keys[work.adapter]
        self.core.add(AddRequest(self._next_id, work.prompt, sampling, adapter))
        return await ended

    async def step_until(self, done: asyncio.Future[Any]) -> None:
        while not done.done():
            for message in self.core.step():
                for output in message.outputs if isinstance(message, StepOutput) else ():
                    on_tokens, ended = self._waiting[output.request_id]
                    if output.token_ids:
                        on_tokens(len(output.token_ids))
                    if output.finish_reason is not None:
                        del self._waiting[output.request_id]
                        ended.set_result(not output.error)
            await asyncio.sleep(0)

    def run(
        self, work: Sequence[Work], concurrency: int, disturb: Callable[[asyncio.Future[Any]], Any] | None = None
    ) -> list[Record]:
        async def go() -> list[Record]:
            callers = asyncio.ensure_future(closed_loop(self.generate, work, concurrency))
            disturbing = asyncio.ensure_future(disturb(callers)) if disturb is not None else None
            await self.step_until(callers)
            if disturbing is not None:
                await self.step_until(disturbing)
            return (await callers)[0]

        return asyncio.run(go())


def make_work(name: str, count: int, adapters: Sequence[int], prompt: int, output: int, zipf: float) -> list[Work]:
    rng = random.Random(f"{SEED}/{name}")
    weights = [1 / (1 + rank) ** zipf for rank in range(len(adapters))]
    return [
        Work([rng.randrange(FIRST_TOKEN_ID, VOCAB) for _ in range(prompt)], output, chosen)
        for chosen in rng.choices(adapters, weights, k=count)
    ]


# ---- the parts -------------------------------------------------------------------------------------------------------


def many(model: Path, threads: int, root: Path) -> dict[str, Any]:
    """Throughput over the number of adapters that requests choose from, all of them in host memory."""
    bench = Bench(model, Setup(COUNTS[-1]), threads, root)
    load_seconds = bench.load_all()
    bench.run(make_work("warm", 32, range(5), 64, 8, ZIPF), 32)
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for repeat in range(3):
        for count in COUNTS if repeat % 2 == 0 else reversed(COUNTS):
            # Spread over all ranks, whatever the count: the popular ones are no smaller than the others.
            work = make_work(f"many/{count}/{repeat}", 96, range(count), 64, 32, ZIPF)
            summary = summarise(bench.run(work, 32))
            runs[count].append(summary | {"distinct": len({item.adapter for item in work})})
    bench.close()
    return {"load_seconds": load_seconds, "host_bytes": bench.core.store.used_bytes, "runs": runs}


def hot(model: Path, threads: int, root: Path) -> dict[str, Any]:
    """Time to first token with as many and with twice as many hot adapters as the device holds."""
    slots = 16
    bench = Bench(model, Setup(2 * slots, max_resident=slots), threads, root)
    bench.load_all()
    cells = {}
    for concurrency in (8, 16, 32):
        for count in (slots, 2 * slots):
            bench.run(make_work("warm", 32, range(count), 64, 4, 0.0), concurrency)
            records = bench.run(make_work(f"hot/{count}", 128, range(count), 64, 16, 0.0), concurrency)
            cells[f"{count}/{concurrency}"] = summarise(records)
    bench.close()
    return {"slots": slots, "cells": cells}


def bad(model: Path, threads: int, root: Path) -> dict[str, Any]:
    """Time to first token of well-behaved requests beside a neighbour whose adapter is cold, broken, slow or huge."""
    bench = Bench(model, Setup(64), threads, root)
    for index in range(8):
        bench.core.load_adapter(LoadAdapter(bench.keys[index], str(bench.paths[index])))
    broken = bench.paths[60] / WEIGHTS_FILE
    broken.unlink()
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    huge = bench.paths[61]
    (huge / WEIGHTS_FILE).unlink()
    write_weights(bench.shape, 256, 1, ("q_proj", "k_proj", "v_proj", "o_proj"), huge / WEIGHTS_FILE)
    (huge / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 256, "lora_alpha": 256}))
    bench.keys[61] = AdapterKey("shared/huge", digest(huge))
    slow_load = bench.core.store._load

    def load(key: AdapterKey, path: Path) -> Any:
        if key == bench.keys[62]:
            time.sleep(5.0)  # a disk that hangs
        return slow_load(key, path)

    bench.core.store._load = load  # type: ignore[assignment]  # there is no slow disk to be had

    def neighbour(indices: Sequence[int]) -> Callable[[asyncio.Future[Any]], Any]:
        async def disturb(callers: asyncio.Future[Any]) -> None:
            number = 0
            while not callers.done():
                index = indices[number % len(indices)]
                number += 1
                key, path = bench.keys[index], bench.paths[index]
                bench.core.load_adapter(LoadAdapter(key, str(path)))
                request = bench.request(Work([300] * 8, 1, index), lambda count: None)
                await asyncio.wait({asyncio.ensure_future(request), callers}, return_when=asyncio.FIRST_COMPLETED)
                bench.core.pool.unload(key)  # cold again for the next one
                bench.core.store.unregister(key)
                await asyncio.wait({callers}, timeout=0.1)

        return disturb

    cases = {"cold": range(8, 60), "broken": [60], "huge": [61], "slow": [62]}
    runs: dict[str, list[list[float]]] = {name: [] for name in ("alone", *cases)}
    bench.run(make_work("warm", 32, range(8), 64, 4, 0.0), 8)
    for repeat in range(2):
        for name in runs if repeat % 2 == 0 else reversed(runs):
            work = make_work(f"bad/{repeat}", 120, range(8), 64, 12, 0.0)
            records = bench.run(work, 8, neighbour(cases[name]) if name in cases else None)
            runs[name].append([record.ttft for record in records])
    bench.close()
    pooled = {name: [ttft for run in found for ttft in run] for name, found in runs.items()}
    return {
        name: {"ttft_p50_seconds": percentile(values, 0.5), "ttft_p99_seconds": percentile(values, 0.99)}
        for name, values in pooled.items()
    }


PARTS = {"many": many, "hot": hot, "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    file = args.out.with_name(args.out.name + ".json")
    report = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    report |= {"date": time.strftime("%Y-%m-%d"), "model": args.model.name, "machine": machine()}
    for part in args.parts:
        root = Path(tempfile.mkdtemp(prefix="loraplex-adapters-"))
        try:
            found = PARTS[part](args.model, args.threads, root)
        finally:
            shutil.rmtree(root)
        command = f"python -m benchmarks.adapters --model DIR/{args.model.name} --out OUT --parts {part}"
        report["parts"][part] = {"command": command, "found": found}
        file.write_text(json.dumps(report, indent=1) + "\n")
    write_report(json.loads(file.read_text()), args.out)


if __name__ == "__main__":
    main()
