"""LoRA adapters with random weights, written as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey


def write_lora(
    folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 2, bias: bool = False, dora: bool = False
) -> AdapterKey:
    """An adapter at modules of these shapes [N, C]. At modules of one shape it is the same.  bias: of B, too."""
    folder.mkdir(parents=True)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4 * rank,
        "target_modules": [*shapes],
        "lora_bias": bias,
        "use_dora": dora,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {}
    for module, (out_features, in_features) in shapes.items():
        generator = torch.Generator().manual_seed(2)
        name = f"base_model.model.{module}.lora"
        tensors[f"{name}_A.weight"] = torch.randn(rank, in_features, generator=generator)
        tensors[f"{name}_B.weight"] = torch.randn(out_features, rank, generator=generator)
        if dora:
            magnitudes = torch.rand(out_features, generator=generator) + 0.5
            tensors[f"{name}_magnitude_vector"] = magnitudes
        if bias:
            tensors[f"{name}_B.bias"] = torch.randn(out_features, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return AdapterKey("shared/lora", digest(folder))
