"""Quantised linears within transformers' own classes give the logits of the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_engine.borrowed.loading import load_borrowed
from loraplex_engine.borrowed.model import BorrowedModel
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.quantization import round_to_nearest
from loraplex_kernels.quantized import dequantize
from loraplex_kernels.selection import select_ops
from tests.engine.quantization.formats import FORMATS
from tests.engine.quantization.packing import Packer
from tests.reference.borrowed import LENGTH, of
from tests.reference.test_model_logits import LENGTHS, Stepper, assert_same, prompts, randomised

WIDE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}


def load(path: Path, **fields: str) -> BorrowedModel:
    config = EngineConfig(model=str(path), dtype="float32", max_resident_adapters=2, **fields)  # type: ignore[arg-type]
    return load_borrowed(config, path, select_ops(torch.device("cpu"), "reference"))


def logits(path: Path, **fields: str) -> list[Tensor]:
    stepper = Stepper(load(path, **fields), prompts())
    stepper.step(*enumerate(LENGTHS))
    return stepper.results()


def change_weights(path: Path, ends: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    file = path / "model.safetensors"
    stored = load_file(file)
    changed = {name: change(weight).contiguous() for name, weight in stored.items() if name.endswith(ends)}
    save_file(stored | changed, file, {"format": "pt"})


def pack(path: Path, section: dict[str, object], packer: Packer, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Have the format's tensors in place of some weights; the weights that they stand for."""
    file, generator = path / "model.safetensors", torch.Generator().manual_seed(3)
    stored, weights = load_file(file), {}
    for name in [name for name in stored if name.endswith(ends)]:
        tensors, weights[name] = packer(generator, *stored.pop(name).shape)
        module = name.removesuffix(".weight")
        stored |= {module + suffix: tensor for suffix, tensor in tensors.items() if module + suffix not in stored}
    save_file(stored, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return weights


@pytest.mark.parametrize(
    "name", ["gptq", "awq gemm", "bitsandbytes nf4", "bitsandbytes int8", "compressed-tensors int4"]
)
def test_a_checkpoint_gives_the_logits_of_its_weights(name: str, tmp_path: Path) -> None:
    section, packer = FORMATS[name]
    for folder in ("quantised", "dense"):
        randomised(of("GPTNeoX", WIDE)).save_pretrained(tmp_path / folder)
    ends = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
    weights = pack(tmp_path / "quantised", section, packer, ends)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    save_file(dense | weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    assert_same(logits(tmp_path / "quantised"), logits(tmp_path / "dense"))


@pytest.mark.parametrize("method", ["nf4", "int8", "int4"])
def test_linears_are_rounded_while_they_are_loaded(method: str, tmp_path: Path) -> None:
    randomised(of("GPT2", GPT, "LMHeadModel")).save_pretrained(tmp_path)
    rounded = logits(tmp_path, quantization=method)
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # which lie transposed
    change_weights(tmp_path, ends, lambda weight: dequantize(round_to_nearest(weight.t().contiguous(), method)).t())
    assert_same(rounded, logits(tmp_path))


def test_the_head_is_rounded_by_itself(tmp_path: Path) -> None:
    randomised(of("GPTNeoX", WIDE)).save_pretrained(tmp_path)
    rounded = logits(tmp_path, head_quantization="int8")
    change_weights(tmp_path, ("embed_out.weight", "lm_head.weight"), lambda w: dequantize(round_to_nearest(w, "int8")))
    assert_same(rounded, logits(tmp_path))


def test_what_is_quantised_is_named(tmp_path: Path) -> None:
    randomised(of("GPTNeoX", WIDE)).save_pretrained(tmp_path)
    config = load(tmp_path, quantization="nf4", head_quantization="int8").config
    assert config.quantization == "nf4, lm_head int8"


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    randomised(of("GPTNeoX", WIDE)).save_pretrained(tmp_path)
    pack(tmp_path, *FORMATS["gptq"], ("dense_h_to_4h.weight",))
    with pytest.raises(ModelError, match="quantization 'int8' is asked for, and the checkpoint is quantised already"):
        load(tmp_path, quantization="int8")
