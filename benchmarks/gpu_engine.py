"""Throughput of the whole engine in this process, on random weights: no messages, no tokenizer, no gRPC."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.systems.loraplex_inprocess import Driver
from benchmarks.workload import Work
from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import WantAdapter
from loraplex_engine.models import parse_model_config
from loraplex_engine.models.layout import EMBEDDING, layer_linears, tensor_shapes
from loraplex_service.bench.records import summarise

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARD_BYTES = 4 << 30


def llama(hidden: int, layers: int, heads: tuple[int, int, int], intermediate: int, vocab: int) -> dict[str, Any]:
    """heads: query, kv, dimension"""
    return LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }


SHAPES = {
    "llama-8b": llama(4096, 32, (32, 8, 128), 14336, 128256),
    "llama-1b": llama(2048, 16, (32, 8, 64), 8192, 128256),
    "tiny": llama(32, 2, (2, 1, 16), 48, 400),
}


@dataclass(frozen=True)
class Load:
    """How the engine is used: `streams` requests at once, one wave of them."""

    streams: tuple[int, ...]
    ranks: tuple[int, ...]  # of the adapters, which take turns
    prompt: int  # tokens
    output: int  # tokens


SERVING = Load((1, 8, 32, 64), (16, 16, 8, 64, 16, 32, 8, 16), prompt=128, output=128)
TINY = Load((2,), (4, 8), prompt=4, output=3)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    model: str
    streams: int
    adapters: int
    graphs: bool  # whether decoding steps are replayed as CUDA graphs
    tokens_per_second: float  # output
    ttft_seconds: float  # medians
    tpot_seconds: float
    step_bytes: int  # that a decoding step has to read

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_checkpoint(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    """Random weights in Hugging Face layout, tame enough that activations stay finite. Holds one file in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape))
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, size in tensor_shapes(parse_model_config(shape, "random model")).items():
        tensor = torch.randn(size, dtype=torch.bfloat16, device=device)
        tensor = tensor.mul_(size[-1] ** -0.5) if len(size) > 1 else tensor.fill_(1.0)
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.cpu()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(folder: Path, shape: dict[str, Any], rank: int) -> int:
    """A PEFT adapter on all seven linears → its bytes on the device."""
    config = parse_model_config(shape, "random model")
    generator = torch.Generator().manual_seed(rank)
    tensors, targets = {}, set()
    for layer in range(config.num_layers):
        for linear in layer_linears(config, layer):
            for part, out_features in linear.parts:
                prefix = f"base_model.model.model.layers.{layer}.{part}"
                a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
                b = torch.randn(out_features, rank, generator=generator) * 0.05
                tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a.bfloat16(), b.bfloat16()
                targets.add(part.rsplit(".", 1)[-1])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "random"}))
    return sum(tensor.nbytes for tensor in tensors.values())


class Bench:
    """One model with its adapters, loaded."""

    def __init__(self, name: str, folder: Path, load: Load, device: torch.device, kernels: str) -> None:
        self.name = name
        self.load = load
        self._shape = SHAPES[name]
        make_checkpoint(folder / "base", self._shape, device)
        paths = [folder / "adapters" / f"a{index}" for index in range(len(load.ranks))]
        self._adapter_bytes = [
            make_adapter(path, self._shape, rank) for path, rank in zip(paths, load.ranks, strict=True)
        ]
        longest = load.prompt + load.output
        config = EngineConfig(
            model=str(folder / "base"),
            device=str(device),
            kernels=kernels,
            max_model_len=max(64, 2 * longest),
            kv_cache_bytes=(8 << 30) if device.type == "cuda" else (8 << 20),
            max_num_seqs=max(load.streams),
            max_num_batched_tokens=8192,
            adapter_device_bytes=4 << 30,
            max_resident_adapters=len(paths),
            enable_prefix_caching=False,
        )
        self.core = EngineCore.load(config)
        keys = [AdapterKey(f"shared/{path.name}", digest(path)) for path in paths]
        for key, path in zip(keys, paths, strict=True):
            self.core.want_adapter(WantAdapter(key, 1, str(path)))
        while self.core.has_work():
            self.core.step()
        self._driver = Driver(self.core, keys)

    def run(self, in_time: Callable[[], bool]) -> Iterator[Row]:
        """Base and adapters at every number of streams, as long as there is time; then without graphs, at the least."""
        for streams in self.load.streams:
            for adapters in (0, len(self.load.ranks)):
                if in_time():
                    yield self._row(streams, adapters)
        if self.core.runner.decode_graphs is not None and in_time():
            self.core.runner.decode_graphs = None
            yield self._row(self.load.streams[0], 0)

    def _row(self, streams: int, adapters: int) -> Row:
        self._wave(streams, adapters, output=2)  # compiles and captures
        figures = self._wave(streams, adapters, self.load.output)
        return Row(
            self.name,
            streams,
            adapters,
            self.core.runner.decode_graphs is not None,
            figures["output_tokens_per_second"],
            figures["ttft_p50_seconds"],
            figures["tpot_p50_seconds"],
            self._step_bytes(streams, adapters),
        )

    def _wave(self, streams: int, adapters: int, output: int) -> dict[str, float]:
        rng = random.Random(streams * 100 + adapters)
        work = [
            Work([rng.randrange(3, self._shape["vocab_size"]) for _ in range(self.load.prompt)], output, adapter)
            for adapter in self._adapters_of(streams, adapters)
        ]
        loop = asyncio.new_event_loop()
        try:
            records, _ = loop.run_until_complete(self._driver.run(work, streams))
        finally:
            loop.close()
        return summarise(records)

    @staticmethod
    def _adapters_of(streams: int, adapters: int) -> Sequence[int | None]:
        return [index % adapters if adapters else None for index in range(streams)]

    def _step_bytes(self, streams: int, adapters: int) -> int:
        """Weights but for the embedding table, the keys and values of all streams half-way, and the adapters in use."""
        core = self.core
        shapes = tensor_shapes(parse_model_config(self._shape, self.name))
        rows, columns = shapes[EMBEDDING]
        weights = core.limits.weight_bytes - 2 * rows * columns
        per_token = core.limits.kv_cache_bytes // (core.limits.total_blocks * core.limits.block_size)
        context = streams * (self.load.prompt + self.load.output // 2) * per_token
        return weights + context + sum(self._adapter_bytes[: min(streams, adapters)])
