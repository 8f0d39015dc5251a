"""Layers may differ in their feed-forward: a family with a mixture of experts needs nothing but this file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import FeedForward, FusedLinear, ModelConfig
from loraplex_engine.core import EngineCore
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.models import qwen2, registry
from loraplex_engine.models.reading import Family
from loraplex_kernels.ops import LoraSegments, Ops
from tests.engine.models.loras import write_lora
from tests.engine.quantization import packing
from tests.engine.quantization.checkpoints import MODEL, load, logits, make_twins
from tests.engine.quantization.formats import gptq
from tests.reference.stepping import step

NUM_EXPERTS, PER_TOKEN = 3, 2


@dataclass
class Mixture:
    linears: Sequence[LoRALinear]
    experts: Sequence[FeedForward]

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        weights, chosen = self.linears[0](x, lora).float().softmax(1).topk(PER_TOKEN)
        shares = torch.zeros(len(x), NUM_EXPERTS).scatter_(1, chosen, weights / weights.sum(1, keepdim=True))
        return torch.einsum("te,etc->tc", shares, torch.stack([expert(x, lora) for expert in self.experts]))


@dataclass(frozen=True)
class MixtureLayout:
    expert: GatedLayout

    def linears(self, hidden_size: int) -> tuple[FusedLinear, ...]:
        router = FusedLinear("router", "mlp.router", hidden_size, (("mlp.router", NUM_EXPERTS),), False, "nothing")
        dense = self.expert.linears(hidden_size)
        return router, *(_of_expert(index, linear) for index in range(NUM_EXPERTS) for linear in dense)

    def build(self, ops: Ops, linears: Sequence[LoRALinear]) -> Mixture:
        return Mixture(linears, [self.expert.build(ops, linears[i : i + 2]) for i in range(1, len(linears), 2)])


def _of_expert(index: int, linear: FusedLinear) -> FusedLinear:
    path = f"mlp.experts.{index}."
    parts = tuple((part.replace("mlp.", path), size) for part, size in linear.parts)
    return replace(linear, name=f"{index}.{linear.name}", module=linear.module.replace("mlp.", path), parts=parts)


def read_mixture(architecture: str, fields: ConfigFields) -> ModelConfig:
    config = qwen2.read(architecture, fields)
    dense, last = config.feed_forwards
    assert isinstance(last, GatedLayout)
    return replace(config, feed_forwards=(dense, MixtureLayout(last)))


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, Family(("MixtureForTests",), (), read_mixture)))


def generate(folder: Path, tensors: dict[str, Tensor], modules: Sequence[str], **raw: Any) -> list[list[int]]:
    """What a model of these weights continues a prompt with: alone, and with the same LoRA at each of `modules`."""
    key = write_lora(folder / "adapter", {f"model.layers.1.mlp.{module}": (128, 64) for module in modules})
    (folder / "config.json").write_text(json.dumps({**MODEL, **raw}))
    save_file(tensors, folder / "model.safetensors")
    config = EngineConfig(model=str(folder), kv_cache_bytes=1 << 20, max_num_batched_tokens=9, threads=1)
    core, sampling = EngineCore.load(config), SamplingParams(seed=0, temperature=0.0, max_tokens=12)
    core.want_adapter(WantAdapter(key, 1, str(folder / "adapter")))
    for number, adapter in enumerate((None, key)):
        core.add(AddRequest(number, list(range(3, 20)), sampling, adapter))
    tokens: list[list[int]] = [[], []]
    while core.has_work():
        for event in step(core):
            for output in event.outputs if isinstance(event, StepOutput) else ():
                tokens[output.request_id] += output.token_ids
    core.close()
    return tokens


def test_equal_experts_generate_what_one_does_and_so_do_equal_adapters_on_them(tmp_path: Path) -> None:
    dense = load_file(make_twins(tmp_path, {}, packing.gptq()).dense / "model.safetensors")
    mlp = {name: tensor for name, tensor in dense.items() if ".1.mlp." in name}
    mixed = {name: tensor for name, tensor in dense.items() if name not in mlp}
    mixed["model.layers.1.mlp.router.weight"] = torch.randn(NUM_EXPERTS, 64, generator=Generator().manual_seed(1))
    for index, (name, tensor) in product(range(NUM_EXPERTS), mlp.items()):
        mixed[name.replace("mlp", f"mlp.experts.{index}")] = tensor.clone()
    wanted = generate(tmp_path / "one", dense, ["up_proj"])
    assert wanted[0] != wanted[1]
    each = [f"experts.{index}.up_proj" for index in range(NUM_EXPERTS)]
    assert generate(tmp_path / "mixed", mixed, each, architectures=["MixtureForTests"]) == wanted


def test_experts_are_read_quantised_where_the_checkpoint_has_them_so(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq(), ("router",), architectures=["MixtureForTests"])
    tokens = torch.arange(3, 20)
    torch.testing.assert_close(logits(load(twins.quantised), tokens), logits(load(twins.dense), tokens))


def test_a_new_kind_of_feed_forward_takes_little(request: pytest.FixtureRequest) -> None:
    assert len(request.path.read_text().splitlines()) <= 120
