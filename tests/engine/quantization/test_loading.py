"""Quantised checkpoints, however they are cut up, give the logits of a dense one with the same weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_engine.checkpoint.model_config import ModelError
from tests.engine.linears import linear_at
from tests.engine.quantization import packing
from tests.engine.quantization.checkpoints import Twins, load, logits, make_twins
from tests.engine.quantization.formats import FORMATS, awq, bitsandbytes, gptq

# Of the largest logit, float32 on both sides: the same sums of the same weights.
TOLERANCE = 1e-5
TOKENS = torch.arange(1, 24) * 4 % 96


def assert_twins_agree(twins: Twins) -> None:
    wanted = logits(load(twins.dense), TOKENS)
    found = logits(load(twins.quantised), TOKENS)
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_gives_the_logits_of_its_weights(tmp_path: Path, name: str) -> None:
    assert_twins_agree(make_twins(tmp_path, *FORMATS[name]))


def test_modules_that_were_skipped_stay_dense(tmp_path: Path) -> None:
    skipped = ("layers.0.mlp.up_proj", "v_proj", "o_proj")  # two of them are parts of fused linears
    section = awq(modules_to_not_convert=["v_proj", "o_proj"])
    assert_twins_agree(make_twins(tmp_path, section, packing.awq_gemm(), skipped))


def test_parts_of_a_fused_linear_may_differ_in_their_order(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(desc_act=True), packing.gptq(act_order=True))
    assert type(linear_at(load(twins.quantised), "layers.0.qkv").linear).__name__ == "SideBySide"
    assert_twins_agree(twins)


def test_parts_of_a_fused_linear_that_are_alike_are_one_matrix(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    assert type(linear_at(load(twins.quantised), "layers.0.qkv").linear).__name__ == "Linear"


def test_a_quantised_head(tmp_path: Path) -> None:
    assert_twins_agree(make_twins(tmp_path, gptq(lm_head=True), packing.gptq(), head=True))


def test_a_tied_head_is_the_dense_embedding(tmp_path: Path) -> None:
    assert_twins_agree(make_twins(tmp_path, bitsandbytes(), packing.bnb_4bit(), tie_word_embeddings=True))


def test_a_quantised_head_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    tensors, _ = packing.gptq()(torch.Generator(), 96, 64)
    twins.change(**{"lm_head.weight": None}, **{f"lm_head{suffix}": tensor for suffix, tensor in tensors.items()})
    raw = json.loads((twins.quantised / "config.json").read_text())
    (twins.quantised / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"unexpected: lm_head\.g_idx"):
        load(twins.quantised)


def test_dynamic_gives_some_modules_other_parameters(tmp_path: Path) -> None:
    dynamic = {
        r"-:.*o_proj": {},
        r"+:.*\.1\..*(gate|up)_proj": {"bits": 8, "group_size": 64},
        r".*layers\.1\.mlp.*": {"bits": 2, "sym": False},
    }
    packers = {"layers.1.mlp.down_proj": packing.gptq(bits=2, sym=False)}
    wide = packing.gptq(bits=8, group=64)
    packers |= {"layers.1.mlp.gate_proj": wide, "layers.1.mlp.up_proj": wide}
    twins = make_twins(tmp_path, gptq(dynamic=dynamic), packing.gptq(), ("o_proj",))
    dense = load_file(twins.dense / "model.safetensors")
    for path, packer in packers.items():
        name = f"model.{path}"
        tensors, weight = packer(torch.Generator().manual_seed(1), *dense[f"{name}.weight"].shape)
        twins.change(**{name + suffix: tensor for suffix, tensor in tensors.items()})
        dense[f"{name}.weight"] = weight
    save_file(dense, twins.dense / "model.safetensors")
    assert_twins_agree(twins)


def test_a_quantised_cache_is_left_to_the_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section, packer = FORMATS["compressed-tensors fp8"]
    twins = make_twins(tmp_path, {**section, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, packer)
    scales = {"k_scale": torch.ones(1), "v_scale": torch.ones(1), "k_proj.k_scale": torch.ones(())}
    twins.change(**{f"model.layers.1.self_attn.{name}": scale for name, scale in scales.items()})
    with caplog.at_level(logging.INFO):
        assert_twins_agree(twins)
    assert "kv_cache_dtype alone decides" in caplog.text


def test_shards(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, *FORMATS["bitsandbytes nf4, nested"])
    stored = load_file(twins.quantised / "model.safetensors")
    (twins.quantised / "model.safetensors").unlink()
    shards = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(sorted(stored))}
    for shard in set(shards.values()):  # the tensors of one linear lie in several files
        save_file({name: stored[name] for name in stored if shards[name] == shard}, twins.quantised / shard)
    (twins.quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_twins_agree(twins)


@pytest.mark.parametrize(
    ("file", "section", "packer"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}, packing.gptq()),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
            packing.awq_gemm(),
        ),
    ],
)
def test_old_checkpoints_state_it_in_a_file_of_its_own(
    tmp_path: Path, file: str, section: dict[str, Any], packer: packing.Packer
) -> None:
    twins = make_twins(tmp_path, {}, packer)
    (twins.quantised / file).write_text(json.dumps(section))
    assert_twins_agree(twins)


OLD_GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("gptq_model-4bit-32g", {**OLD_GPTQ, "model_file_base_name": None}),
        ("gptq_model-4bit-32g", OLD_GPTQ),
        ("mine", {**OLD_GPTQ, "model_file_base_name": "mine"}),
        ("model", {**OLD_GPTQ, "model_file_base_name": "mine"}),  # renamed since, as transformers wants it
    ],
)
def test_old_checkpoints_name_their_file_themselves(tmp_path: Path, name: str, section: dict[str, Any]) -> None:
    twins = make_twins(tmp_path, {}, packing.gptq())
    (twins.quantised / "quantize_config.json").write_text(json.dumps(section))
    (twins.quantised / "model.safetensors").rename(twins.quantised / f"{name}.safetensors")
    assert_twins_agree(twins)


def test_shards_of_a_file_that_is_named_otherwise(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(model_file_base_name="mine"), packing.gptq())
    (twins.quantised / "model.safetensors").rename(twins.quantised / "mine-1-of-1.safetensors")
    weight_map = dict.fromkeys(load_file(twins.quantised / "mine-1-of-1.safetensors"), "mine-1-of-1.safetensors")
    (twins.quantised / "mine.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_twins_agree(twins)


def test_the_file_of_another_name_is_told_with_what_to_do(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    (twins.quantised / "model.safetensors").rename(twins.quantised / "other.safetensors")
    message = r"neither gptq_model-4bit-32g\.safetensors nor .*it has other\.safetensors: .* rename it to model\."
    with pytest.raises(ModelError, match=message):
        load(twins.quantised)


def test_a_file_outside_the_directory_is_refused(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(model_file_base_name="../dense/model"), packing.gptq())
    with pytest.raises(ModelError, match=r"model_file_base_name is '\.\./dense/model'"):
        load(twins.quantised)


def test_config_json_counts_where_two_files_disagree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    (twins.quantised / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": -1, "sym": True}))
    with caplog.at_level(logging.WARNING):
        assert_twins_agree(twins)
    assert "contradicts config.json in bits, group_size" in caplog.text


def test_the_model_says_how_it_is_quantised(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    assert load(twins.quantised).config.quantization == "gptq-4bit-g32"
    assert load(twins.dense).config.quantization == ""
    assert load(twins.dense, quantization="nf4").config.quantization == "nf4"


def test_quantising_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    with pytest.raises(ModelError, match=r"quantization 'nf4' is asked for, .* quantised already \(gptq-4bit-g32\)"):
        load(twins.quantised, quantization="nf4")


# How far a model may be from its unquantised self, of the largest logit: these random ones show 0.0068, 0.139 and
# 0.091; doubled, for the largest of some thousand logits depends on the order of sums.
@pytest.mark.parametrize(("method", "largest"), [("int8", 0.014), ("nf4", 0.28), ("int4", 0.19)])
def test_quantising_while_loading_stays_near_the_dense_model(tmp_path: Path, method: str, largest: float) -> None:
    twins = make_twins(tmp_path, {}, packing.gptq())
    wanted, model = logits(load(twins.dense), TOKENS), load(twins.dense, quantization=method)
    distance = ((logits(model, TOKENS) - wanted).abs().max() / wanted.abs().max()).item()
    assert 1e-4 < distance < largest
