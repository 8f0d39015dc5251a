"""A head that is rounded while the model is loaded, whatever its other linears are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.layers.linear import Linear
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models.layout import EMBEDDING, HEAD
from loraplex_engine.quantization import round_to_nearest
from loraplex_kernels.quantized import dequantize
from tests.engine.linears import linear_at
from tests.engine.quantization import packing
from tests.engine.quantization.checkpoints import load, logits, make_twins
from tests.engine.quantization.formats import awq, gptq
from tests.engine.quantization.test_loading import TOKENS, TOLERANCE


def with_rounded_head(directory: Path, copy: Path) -> Path:
    """A copy whose head, no longer tied, holds what int8 makes of the directory's."""
    shutil.copytree(directory, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[HEAD] = dequantize(round_to_nearest(tensors.get(HEAD, tensors[EMBEDDING]), "int8"))
    save_file(tensors, copy / "model.safetensors")
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    return copy


def assert_only_the_head_is_rounded(directory: Path, copy: Path, quantization: str | None = None) -> None:
    wanted = logits(load(with_rounded_head(directory, copy), quantization=quantization), TOKENS)
    found = logits(load(directory, quantization=quantization, head_quantization="int8"), TOKENS)
    # int8 moves these logits by some thousandths of the largest: an unrounded head would not pass.
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_of_a_dense_checkpoint(tmp_path: Path, quantization: str | None, tied: bool) -> None:
    twins = make_twins(tmp_path, {}, packing.gptq(), tie_word_embeddings=tied)
    assert_only_the_head_is_rounded(twins.dense, tmp_path / "copy", quantization)


@pytest.mark.parametrize(("section", "packer"), [(gptq(), packing.gptq()), (awq(), packing.awq_gemm())])
def test_of_a_quantised_checkpoint_with_a_dense_head(
    tmp_path: Path, section: dict[str, object], packer: packing.Packer
) -> None:
    twins = make_twins(tmp_path, section, packer)
    assert_only_the_head_is_rounded(twins.quantised, tmp_path / "copy")


def test_a_quantised_head_is_not_rounded_again(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(lm_head=True), packing.gptq(), head=True)
    message = r"head_quantization 'int8' is asked for, and lm_head is quantised already \(gptq-4bit-g32\)"
    with pytest.raises(ModelError, match=message):
        load(twins.quantised, head_quantization="int8")


def test_it_takes_a_byte_for_a_weight(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, {}, packing.gptq())
    head = linear_at(load(twins.dense, head_quantization="int8"), "lm_head").linear
    assert isinstance(head, Linear)
    assert head.nbytes < 1.5 * head.in_features * head.out_features  # scales beside it


def test_the_model_says_so(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    assert load(twins.dense, head_quantization="int8").config.quantization == "lm_head int8"
    assert load(twins.quantised, head_quantization="int8").config.quantization == "gptq-4bit-g32, lm_head int8"


def test_a_method_that_heads_do_not_have() -> None:
    with pytest.raises(ValueError, match="head_quantization 'nf4' is not one of int8"):
        EngineConfig(model="x", head_quantization="nf4").check()
