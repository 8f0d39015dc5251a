"""Adapters on a GGUF base, and adapters in llama.cpp's form, against PEFT on the model that the base's values make."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.gguf_lora import GGUF_FILE
from loraplex_adapters.files.source import check_there, describe, digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.weights import load_adapter
from tests.gguf_files import blocks, converted, finish, gguf, write_gguf
from tests.reference.peft_oracle import ALL, KINDS, VOCAB, Engine, Oracle, random_prompt, randomised, transformers

TYPE = "Q5_1"
ON_BASE = ("plain", "dora", "lora-bias", "embedding-and-head", "saved-linears")
IN_ITS_FORM: dict[str, dict[str, Any]] = {
    "all": {"target_modules": [*ALL, "lm_head"]},
    "ranks": {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 7}},
}


@dataclass
class Base:
    oracle: Oracle
    file: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("gguf")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    model = randomised(transformers.LlamaForCausalLM(config), 0)
    write_gguf(folder / "base.gguf", model, "llama", TYPE)
    twin = copy.deepcopy(model)
    kind = gguf.GGMLQuantizationType[TYPE]
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() == 2:
                packed = blocks(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    twin.config._attn_implementation = "eager"
    twin.save_pretrained(folder / "twin")
    oracle = Oracle(folder, {None: None}, {None: twin})
    for seed, name in enumerate(ON_BASE):
        oracle.add(name, KINDS[name], seed)
    for seed, (name, fields) in enumerate(IN_ITS_FORM.items(), start=90):
        oracle.add(name, fields, seed)
        convert_adapter(folder / name, folder / f"{name}.converted", config)
        oracle.models[f"{name}.converted"] = oracle.models[name]
        key = AdapterKey(f"shared/{name}.converted", digest(folder / f"{name}.converted"))
        oracle.keys[f"{name}.converted"] = key
    return Base(oracle, folder / "base.gguf")


def convert_adapter(source: Path, directory: Path, config: Any, type_name: str = "F32") -> None:
    """A PEFT adapter in llama.cpp's form."""
    directory.mkdir()
    writer = gguf.GGUFWriter(directory / GGUF_FILE, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((source / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in load_file(source / "adapter_model.safetensors").items():
        module, part, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        if part == "base_layer":  # the head's own weight, which PEFT writes beside A and B
            continue
        if part == "lora_B":
            tensor = converted(f"{module}.weight", tensor, config, "llama")
        name = f"{names.get_name(f'{module}.weight', try_suffixes=('.weight',))}.{part.lower()}"
        writer.add_tensor(name, tensor.contiguous().numpy())
    finish(writer)


def test_adapters_compute_what_peft_does(base: Base) -> None:
    engine = Engine(base.oracle, model=str(base.file))
    for number, name in enumerate(base.oracle.keys):
        engine.add(random_prompt(9 + number, number), name)
    engine.finish()
    engine.check()


def test_a_converted_adapter_is_described_as_its_source(base: Base) -> None:
    one, other = (describe(base.oracle.folder / name) for name in ("ranks", "ranks.converted"))
    paths = {module.removeprefix("base_model.model."): rank for module, rank in one.module_ranks.items()}
    assert {m.removeprefix("base_model.model."): r for m, r in other.module_ranks.items()} == paths
    assert other.rank == 7
    check_there(base.oracle.folder / "ranks.converted")


def refused(directory: Path) -> str:
    with pytest.raises(AdapterRejected) as caught:
        describe(directory)
    return str(caught.value)


def write_adapter(directory: Path, tensors: tuple[str, ...] = (), **metadata: Any) -> None:
    writer = gguf.GGUFWriter(directory / GGUF_FILE, metadata.pop("architecture", "llama"))
    writer.add_type(metadata.pop("type", gguf.GGUFType.ADAPTER))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, metadata.pop("alpha", 4.0))
    for name in tensors:
        writer.add_tensor(name, torch.zeros(4, 8).numpy())
    finish(writer)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path, type=gguf.GGUFType.MODEL)
    assert "adapter_model.gguf: general.type is 'model', not 'adapter'" in refused(tmp_path)


@pytest.mark.parametrize("architecture", ["glm4moe", "mistral3", "nonsense"])
def test_an_architecture_that_is_not_known_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, ("blk.0.attn_q.weight.lora_a",), architecture=architecture)
    assert f"general.architecture is '{architecture}'; the known ones are llama" in refused(tmp_path)


def test_rows_in_another_order_are_refused_where_heads_are_of_no_known_size(tmp_path: Path) -> None:
    write_adapter(tmp_path, ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"))
    targets = {"model.layers.0.self_attn.q_proj": LoraTarget("site", 8, 0, 16)}
    key = AdapterKey("x", digest(tmp_path))
    with pytest.raises(AdapterRejected, match=r"layers\.0\.self_attn\.q_proj: .*the size of the heads is not known"):
        load_adapter(key, tmp_path, targets, torch.float32, 64, lambda weights: weights)


def test_what_is_no_linear_is_refused_by_name(tmp_path: Path) -> None:
    write_adapter(tmp_path, ("token_embd.weight.lora_a", "blk.0.attn_norm.weight.lora_b", "blk.0.attn_q.weight"))
    said = refused(tmp_path)
    assert all(name in said for name in ("token_embd.weight.lora_a", "attn_norm.weight.lora_b", "blk.0.attn_q.weight:"))


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, ("blk.0.attn_q.weight.lora_a",), alpha=float("nan"))
    assert "adapter.lora.alpha is nan" in refused(tmp_path)


def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    write_adapter(tmp_path, ("blk.0.attn_q.weight.lora_a",))
    data = (tmp_path / GGUF_FILE).read_bytes()
    (tmp_path / GGUF_FILE).write_bytes(data[: len(data) // 2])
    assert "adapter_model.gguf: " in refused(tmp_path)
