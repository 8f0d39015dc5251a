"""Many adapters, more hot ones than the device holds, and bad neighbours: what each costs everybody else.

    python -m benchmarks.adapters --model DIR/llama-160m --out RESULT [--parts many hot resident cold broken huge slow]

DIR is made by benchmarks.models. Adapters of ranks 8 to 64 on q and v are written to a temporary directory. The engine
runs in this process; its configuration is what `Setup` says, all else is default. Writes RESULT.json, .md and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.key import AdapterKey
from adapters.pace import Rest
from adapters.source import CONFIG_FILE, WEIGHTS_FILE, digest
from benchmarks.adapters_report import write_report
from benchmarks.measure import Record, closed_loop, machine, open_loop, summarise
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

# Beside a neighbour: Poisson arrivals, so that the phase of a step in which one falls is left to chance. Callers that
# wait for each other's steps fall into step, and then a percentile says which of two multiples of a step they hit.
ROUNDS = 8
ROUND_SECONDS = 2.7
ARRIVALS_PER_SECOND = 30.0
NEIGHBOUR_PAUSE_SECONDS = 0.1


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
        gc.collect()  # as the engine process does: else the collector looks at all of torch in the middle of a step
        gc.freeze()
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
                    if output.request_id not in self._waiting:
                        continue  # the end of what was aborted
                    on_tokens, ended = self._waiting[output.request_id]
                    if output.token_ids:
                        on_tokens(len(output.token_ids))
                    if output.finish_reason is not None:
                        del self._waiting[output.request_id]
                        ended.set_result(not output.error)
            # As the engine process does, which looks into its inbox between steps, and waits there if it has no work.
            await asyncio.sleep(0 if self.core.scheduler.running else 0.0005)

    def run(self, work: Sequence[Work], concurrency: int) -> list[Record]:
        """`concurrency` callers, who each wait for an answer before they ask again."""

        async def go() -> list[Record]:
            callers = asyncio.ensure_future(closed_loop(self.generate, work, concurrency))
            await self.step_until(callers)
            return (await callers)[0]

        return asyncio.run(go())

    def run_open(
        self, work: Sequence[Work], seed: int, neighbour: Callable[[asyncio.Future[Any]], Any] | None
    ) -> list[Record]:
        """Requests that come when they come, and perhaps a neighbour until the last of them has its answer."""

        async def go() -> list[Record]:
            callers = asyncio.ensure_future(open_loop(self.generate, work, ARRIVALS_PER_SECOND, seed))
            disturbing = asyncio.ensure_future(neighbour(callers)) if neighbour is not None else None
            await self.step_until(callers)
            if disturbing is not None:
                await self.step_until(disturbing)
            self.core.abort(list(self._waiting))  # what the neighbour still waits for
            self._waiting.clear()
            return await callers

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


def beside(case: str, model: Path, threads: int, root: Path) -> dict[str, Any]:
    """Time to first token of well-behaved requests, with and without a neighbour, in turn and of the same arrivals."""
    bench = Bench(model, Setup(64), threads, root)
    for index in range(8):
        bench.core.load_adapter(LoadAdapter(bench.keys[index], str(bench.paths[index])))
    indices = CASES[case]
    _make_bad(bench, case)

    async def neighbour(callers: asyncio.Future[Any]) -> None:
        for index in itertools.cycle(indices):
            key, path = bench.keys[index], bench.paths[index]
            bench.core.load_adapter(LoadAdapter(key, str(path)))
            request = bench.request(Work([300] * 8, 1, index), lambda count: None)
            await asyncio.wait({asyncio.ensure_future(request), callers}, return_when=asyncio.FIRST_COMPLETED)
            if case != "resident":
                bench.core.pool.unload(key)  # cold again for the next one
                bench.core.store.unregister(key)
            await asyncio.wait({callers}, timeout=NEIGHBOUR_PAUSE_SECONDS)
            if callers.done():
                return
            loads.append(index)

    bench.run(make_work("warm", 64, range(8), 64, 4, 0.0), 8)
    rounds = []
    loads: list[int] = []
    num_requests = int(ROUND_SECONDS * ARRIVALS_PER_SECOND)
    works = [make_work(f"bad/{number}", num_requests, range(8), 32, 4, 0.0) for number in range(ROUNDS)]
    for number, work in enumerate(works):
        found = {}
        for name in ("alone", "beside") if number % 2 == 0 else ("beside", "alone"):
            records = bench.run_open(work, number, neighbour if name == "beside" else None)
            found[name] = {key: value for key, value in summarise(records).items() if key.startswith("ttft")}
        rounds.append(found)
    bench.close()
    return {"neighbour_requests": len(loads), "requests": sum(map(len, works)), "rounds": rounds}


def _make_bad(bench: Bench, case: str) -> None:
    (first, *_) = CASES[case]
    path = bench.paths[first]
    if case == "broken":
        (path / WEIGHTS_FILE).unlink()
        (path / WEIGHTS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    elif case == "huge":
        (path / WEIGHTS_FILE).unlink()
        write_weights(bench.shape, 256, 1, ("q_proj", "k_proj", "v_proj", "o_proj"), path / WEIGHTS_FILE)
        (path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 256, "lora_alpha": 256}))
        bench.keys[first] = AdapterKey("shared/huge", digest(path))
    elif case == "slow":
        load = bench.core.store._load

        def hang(key: AdapterKey, path: Path, rest: Rest) -> Any:
            if key == bench.keys[first]:
                time.sleep(5.0)
            return load(key, path, rest=rest)

        bench.core.store._load = hang  # type: ignore[assignment]  # there is no slow disk to be had


# What the neighbour asks for. A resident adapter is the yardstick: one more caller, and nothing to load.
CASES = {"resident": range(8), "cold": range(8, 60), "broken": [60], "huge": [61], "slow": [62]}
PARTS: dict[str, Callable[[Path, int, Path], dict[str, Any]]] = {
    "many": many,
    "hot": hot,
    **{case: partial(beside, case) for case in CASES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    file = args.out.with_name(args.out.name + ".json")
    report = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    report["parts"] = {name: part for name, part in report["parts"].items() if name in PARTS}
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
