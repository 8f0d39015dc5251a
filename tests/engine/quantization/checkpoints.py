"""Tiny models on disk: one with quantised linears, and its twin with the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from loraplex_engine.execution.kv_cache import create_kv_cache
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import LanguageModel, load_model, parse_model_config
from loraplex_engine.models.layout import HEAD, layer_linears, tensor_shapes
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, Ops
from loraplex_kernels.selection import select_ops
from tests.engine.quantization.packing import Packer

MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BLOCK_SIZE = 16


@dataclass
class Twins:
    quantised: Path
    dense: Path

    def change(self, **tensors: Tensor | None) -> None:
        """Replace tensors of the quantised model, or remove them."""
        stored = load_file(self.quantised / "model.safetensors")
        kept = {name: tensor for name, tensor in stored.items() if name not in tensors}
        added = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept | added, self.quantised / "model.safetensors")


def make_twins(
    folder: Path,
    section: Mapping[str, Any],
    packer: Packer,
    skipped: tuple[str, ...] = (),
    head: bool = False,
    **changes: Any,
) -> Twins:
    """skipped: endings of the paths of linears that are left dense. head: quantise it too."""
    raw = {**MODEL, **changes}
    config = parse_model_config(raw, "config.json")
    generator = Generator().manual_seed(3)
    shapes = tensor_shapes(config)
    dense = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    stored = dict(dense)
    linears = {
        f"model.layers.{layer}.{part}"
        for layer in range(config.num_layers)
        for linear in layer_linears(config, layer)
        for part, _ in linear.parts
        if not part.endswith(skipped or ("nothing",))
    }
    for path in sorted(linears | ({HEAD.removesuffix(".weight")} if head else set())):
        tensors, weight = packer(generator, *shapes[f"{path}.weight"])
        del stored[f"{path}.weight"]
        stored |= {path + suffix: tensor for suffix, tensor in tensors.items() if path + suffix not in stored}
        dense[f"{path}.weight"] = weight
    twins = Twins(folder / "quantised", folder / "dense")
    for directory, tensors, extra in (
        (twins.quantised, stored, {"quantization_config": dict(section)} if section else {}),
        (twins.dense, dense, {}),
    ):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(raw | extra))
        save_file(tensors, directory / "model.safetensors")
    return twins


def reference_ops() -> Ops:
    return select_ops(torch.device("cpu"), "reference")


def load(directory: Path, ops: Ops | None = None, **fields: Any) -> LanguageModel:
    config = EngineConfig(model=str(directory), max_resident_adapters=2, **fields)
    return load_model(config, directory, ops or reference_ops())


def logits(model: LanguageModel, token_ids: Tensor, ops: Ops | None = None) -> Tensor:
    """token_ids: [T] → float32 [T, V], in one step."""
    length = len(token_ids)
    num_blocks = -(-length // BLOCK_SIZE)
    positions = torch.arange(length)
    attention = AttentionMetadata(
        torch.tensor([0, length], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        positions,
        length,
        length,
    )
    batch = StepBatch(token_ids, positions, attention, None, positions)
    cache = create_kv_cache(model.config, ops or reference_ops(), num_blocks, BLOCK_SIZE, model.dtype)
    with torch.inference_mode():
        return model.logits(model.forward(batch, cache))
