"""A small model's projections, and adapters for it written to disk."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.targets import LoraTarget

HIDDEN, QUERY, KEY, INTERMEDIATE = 8, 12, 4, 10
LAYERS = 2
QUERY_MODULE = "model.layers.0.self_attn.q_proj"

AdapterMaker = Callable[..., Path]
TensorMaker = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def targets() -> dict[str, LoraTarget]:
    """Two decoder layers with fused q/k/v and gate/up, query heads three times as wide as key heads."""
    found: dict[str, LoraTarget] = {}
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        start = 0
        for name, width in (("q_proj", QUERY), ("k_proj", KEY), ("v_proj", KEY)):
            found[f"{attention}.{name}"] = LoraTarget(f"{i}.qkv", HIDDEN, start, width)
            start += width
        found[f"{attention}.qkv_proj"] = LoraTarget(f"{i}.qkv", HIDDEN, 0, start)
        found[f"{attention}.o_proj"] = LoraTarget(f"{i}.o", QUERY, 0, HIDDEN)
        found[f"{mlp}.gate_proj"] = LoraTarget(f"{i}.gate_up", HIDDEN, 0, INTERMEDIATE)
        found[f"{mlp}.up_proj"] = LoraTarget(f"{i}.gate_up", HIDDEN, INTERMEDIATE, INTERMEDIATE)
        found[f"{mlp}.gate_up_proj"] = LoraTarget(f"{i}.gate_up", HIDDEN, 0, 2 * INTERMEDIATE)
        found[f"{mlp}.down_proj"] = LoraTarget(f"{i}.down", INTERMEDIATE, 0, HIDDEN)
    return found


@pytest.fixture
def lora_tensors(targets: dict[str, LoraTarget]) -> TensorMaker:
    """Makes random A and B for some projections, named as PEFT names them."""

    def make(
        modules: Iterable[str] = (QUERY_MODULE,), rank: int = 4, seed: int = 0, prefix: str = "base_model.model."
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module in modules:
            target = targets[module]
            tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(rank, target.in_features, generator=generator)
            tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(target.out_features, rank, generator=generator)
        return tensors

    return make


@pytest.fixture
def make_adapter(tmp_path: Path, lora_tensors: TensorMaker) -> AdapterMaker:
    """Writes an adapter directory: by default rank 4 on the query projection of both layers."""

    def make(
        name: str = "adapter",
        tensors: dict[str, torch.Tensor] | None = None,
        modules: Iterable[str] = (QUERY_MODULE, "model.layers.1.self_attn.q_proj"),
        rank: int = 4,
        seed: int = 0,
        **fields: object,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]} | fields
        (directory / "adapter_config.json").write_text(json.dumps(config))
        tensors = lora_tensors(modules, rank, seed) if tensors is None else tensors
        save_file(tensors, directory / "adapter_model.safetensors")
        return directory

    return make


@pytest.fixture
def key_of() -> Callable[[Path], AdapterKey]:
    """The key of an adapter directory, with its true digest."""
    return lambda directory: AdapterKey(f"shared/{directory.name}", digest(directory))
