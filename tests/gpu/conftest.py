"""A small random model with adapters, in Hugging Face and PEFT layout, and engines that run it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams

transformers = pytest.importorskip("transformers")

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1000}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
WIDTHS = {"q_proj": (256, 512), "v_proj": (256, 128), "o_proj": (512, 256), "up_proj": (256, 512)}
RANKS = {"narrow": 4, "middle": 16, "wide": 70}  # each makes a table wider than the one before


@dataclass
class Checkpoint:
    folder: Path

    def adapter(self, name: str) -> Path:
        return self.folder / "adapters" / name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **HEADS, max_position_embeddings=1024))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # the initial weights are so small that every next token is nearly a tie
    model.save_pretrained(folder / "base")
    for name, rank in RANKS.items():
        _save_adapter(folder / "adapters" / name, rank)
    return Checkpoint(folder)


def _save_adapter(folder: Path, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for projection, (c, n) in WIDTHS.items():
            block = "mlp" if projection == "up_proj" else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{projection}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, c, generator=generator) / c**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, rank, generator=generator) / rank**0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(WIDTHS)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))


class Engine:
    """A core, and who wants what from it."""

    def __init__(self, checkpoint: Checkpoint, **settings: Any) -> None:
        fields: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16}
        fields |= {"kv_cache_bytes": 64 << 20} | settings
        self.core = EngineCore.load(EngineConfig(model=str(checkpoint.folder / "base"), **fields))
        self._checkpoint = checkpoint
        self._keys: dict[str, AdapterKey] = {}

    def load(self, name: str) -> None:
        path = self._checkpoint.adapter(name)
        self._keys[name] = AdapterKey(f"shared/{name}", digest(path))
        self.core.want_adapter(WantAdapter(self._keys[name], 1, str(path)))
        while self.core.has_work():
            self.core.step()

    def generate(
        self, requests: list[tuple[list[int], str | None]], max_tokens: int, temperature: float = 0.0, **fields: Any
    ) -> list[list[int]]:
        """Tokens of (prompt, adapter) requests that run together; greedy ones, unless otherwise asked for."""
        sampling = SamplingParams(seed=0, temperature=temperature, max_tokens=max_tokens, **fields)
        for index, (prompt, adapter) in enumerate(requests):
            self.core.add(AddRequest(index, prompt, sampling, None if adapter is None else self._keys[adapter]))
        tokens: list[list[int]] = [[] for _ in requests]
        while self.core.has_work():
            for message in self.core.step():
                for output in message.outputs if isinstance(message, StepOutput) else ():
                    assert not output.error
                    tokens[output.request_id] += output.token_ids
        return tokens


@pytest.fixture
def make_engine(checkpoint):
    engines = []

    def make(**settings: Any) -> Engine:
        engines.append(Engine(checkpoint, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.core.close()
