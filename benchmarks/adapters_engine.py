"""The engine of benchmarks.adapters, in the same process as its callers, and adapters for it on the disk."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import at_rate
from benchmarks.workload import Work
from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE, digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.bench.loops import closed_loop, open_loop
from loraplex_service.bench.records import Record

RANKS = (8, 16, 32, 64)
FILES_PER_RANK = 8  # the files of further adapters are links to these, under configurations of their own
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOST_BYTES = 12 << 30
TURNS_OF_AN_ARRIVAL = 3  # of the event loop, from a timer that is due to the request in the engine


@dataclass(frozen=True)
class Setup:
    """The engine of one part."""

    num_adapters: int
    max_resident: int = 256
    max_rank: int = 256
    targets: tuple[str, ...] = ("q_proj", "v_proj")


# ---- adapters on the disk --------------------------------------------------------------------------------------------


def write_weights(model: dict[str, Any], rank: int, seed: int, targets: Sequence[str], file: Path) -> None:
    hidden, inner, heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    kv = hidden // heads * model["num_key_value_heads"]
    outputs = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "gate_proj": inner, "up_proj": inner}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name in targets:
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            module = f"base_model.model.model.layers.{layer}.{block}.{name}"
            inputs = inner if name == "down_proj" else hidden
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs.get(name, hidden), rank, generator=generator) * 0.05 / rank**0.5
            tensors[f"{module}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{module}.lora_B.weight"] = b.to(torch.bfloat16)
    save_file(tensors, file)


def write_adapters(model: dict[str, Any], count: int, targets: Sequence[str], root: Path) -> list[Path]:
    weights: dict[tuple[int, int], Path] = {}
    for rank in RANKS:
        for number in range(min(FILES_PER_RANK, ceil(count / len(RANKS)))):
            weights[rank, number] = root / f"r{rank}-{number}.safetensors"
            write_weights(model, rank, 100 * rank + number, targets, weights[rank, number])
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
        self.paths = write_adapters(shape, setup.num_adapters, setup.targets, root)
        self.keys = [AdapterKey(f"shared/{path.name}", digest(path)) for path in self.paths]
        config = EngineConfig(
            model=str(model / "base"),
            threads=threads,
            max_model_len=1024,
            max_num_seqs=64,
            kv_cache_bytes=512 << 20,
            max_resident_adapters=setup.max_resident,
            max_adapter_rank=setup.max_rank,
            adapter_device_bytes=4 << 30,
            adapter_host_bytes=HOST_BYTES,
            enable_prefix_caching=False,
        )
        self.core = EngineCore.load(config)
        gc.collect()  # as the engine process does: else the collector looks at all of torch in the middle of a step
        gc.freeze()
        self._next_id = 0
        self.slot_waits: list[float] = []  # seconds, of the requests that waited for an adapter
        self._waiting: dict[int, tuple[Callable[[int], None], asyncio.Future[bool]]] = {}

    def close(self) -> None:
        self.core.close()

    def load_all(self) -> float:
        """Register every adapter and wait until all are in host memory. Seconds."""
        began = time.perf_counter()
        for key, path in zip(self.keys, self.paths, strict=True):
            self.core.want_adapter(WantAdapter(key, 1, str(path)))
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
        ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
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
                    if output.adapter_load_seconds:
                        self.slot_waits.append(output.adapter_load_seconds)
                    on_tokens, ended = self._waiting[output.request_id]
                    if output.token_ids:
                        on_tokens(len(output.token_ids))
                    if output.finish_reason is not None:
                        del self._waiting[output.request_id]
                        ended.set_result(not output.error)
            # As the engine process does: it takes all that has come between steps, and waits there without work.
            for _ in range(TURNS_OF_AN_ARRIVAL):
                await asyncio.sleep(0)
            if not self.core.scheduler.running:
                await asyncio.sleep(0.0005)

    def run(self, work: Sequence[Work], concurrency: int) -> list[Record]:
        """`concurrency` callers, who each wait for an answer before they ask again."""

        async def go() -> list[Record]:
            callers = asyncio.ensure_future(closed_loop(self.generate, work, concurrency))
            await self.step_until(callers)
            return (await callers)[0]

        return asyncio.run(go())

    def run_open(
        self, work: Sequence[Work], rate: float, seed: int, neighbour: Callable[[asyncio.Future[Any]], Any] | None
    ) -> list[Record]:
        """Requests that come when they come, `rate` a second, and perhaps a neighbour until the last has its answer."""

        async def go() -> list[Record]:
            callers = asyncio.ensure_future(open_loop(self.generate, at_rate(work, rate, seed)))
            disturbing = asyncio.ensure_future(neighbour(callers)) if neighbour is not None else None
            await self.step_until(callers)
            if disturbing is not None:
                await self.step_until(disturbing)
            self.core.abort(list(self._waiting))  # what the neighbour still waits for
            self._waiting.clear()
            return (await callers)[0]

        return asyncio.run(go())
