"""Heads made from latents: quantised as people have them, divided among ranks, on each backend. Chunks, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex_engine.checkpoint.model_config import ModelError, Rope
from loraplex_engine.checkpoint.shard import WHOLE
from loraplex_engine.layers.rotary import cos_sin_table
from loraplex_engine.models import parse_model_config
from loraplex_engine.models.rope_reading import part_of_head
from loraplex_kernels.selection import select_ops
from tests.engine.models.test_shards import RANKS
from tests.engine.models.test_shards import logits as logits_of_ranks
from tests.engine.quantization.checkpoints import MODEL, load, logits, make_twins
from tests.engine.quantization.formats import FORMATS

LATENT: dict[str, Any] = {
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DENSE: dict[str, Any] = {**LATENT, "architectures": ["MiniCPM3ForCausalLM"]}
EXPERTS: dict[str, Any] = {
    **LATENT,
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
# Of the largest logit, float32: adapters as large as these make the scores of attention large, too.
TOLERANCE = 1e-4
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, for tensors on the GPU")
CHUNKS: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "head_dim": 16,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 16,
}
TOKENS = torch.arange(3, 20)
# As MiniMax M2's file has it.
STATED = {"fp8 blocks": {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]}}


@pytest.mark.parametrize("name", ["fp8 blocks", "gptq"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_quantised_latents_and_experts_are_what_they_stand_for(tmp_path: Path, name: str, backend: str) -> None:
    section, packer = FORMATS[name]
    twins = make_twins(tmp_path, {**section, **STATED.get(name, {})}, packer, ("mlp.gate",), **EXPERTS)
    ops = select_ops(torch.device("cpu"), backend, threads=1)
    found, wanted = (logits(load(path, ops), TOKENS, ops) for path in (twins.quantised, twins.dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_in_float8_are_read_as_one_tensor(tmp_path: Path, backend: str) -> None:
    """As in the files of Meta's Maverick: [E, C, N], with a scale for each output feature."""
    twins = make_twins(tmp_path, *FORMATS["fp8 by rows, Meta's"], ("router",), **CHUNKS)
    stored = load_file(twins.quantised / "model.safetensors")

    def stacked(layer: int, names: tuple[str, ...], suffix: str) -> Tensor:
        modules = [[f"model.layers.{layer}.feed_forward.experts.{index}.{name}" for name in names] for index in (0, 1)]
        tensors = [torch.cat([stored[path + suffix].view(torch.uint8) for path in paths]) for paths in modules]
        return torch.stack(tensors).view(stored[modules[0][0] + suffix].dtype)

    changes: dict[str, Tensor | None] = {name: None for name in stored if ".experts." in name}
    for layer in (0, 1):
        for joined, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            path = f"model.layers.{layer}.feed_forward.experts.{joined}"
            changes[path] = stacked(layer, names, ".weight").transpose(1, 2).contiguous()
            changes[f"{path}_scale"] = stacked(layer, names, ".weight_scale")
    twins.change(**changes)
    ops = select_ops(torch.device("cpu"), backend, threads=1)
    found, wanted = (logits(load(path, ops), TOKENS, ops) for path in (twins.quantised, twins.dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [DENSE, CHUNKS], ids=["latents", "chunks"])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=INTERPRETED)])
def test_each_backend_gives_the_logits_of_the_reference(tmp_path: Path, backend: str, fields: dict[str, Any]) -> None:
    small = {"num_hidden_layers": 1, "vocab_size": 32, "intermediate_size": 64}
    dense = make_twins(tmp_path, *FORMATS["gptq"], **{**fields, **small}).dense
    ops = select_ops(torch.device("cpu"), backend)
    wanted = logits(load(dense, dtype="float32"), TOKENS)
    found = logits(load(dense, ops, dtype="float32"), TOKENS, ops)
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("query_rank", [64, None])
def test_two_ranks_give_the_logits_of_one(tmp_path: Path, query_rank: int | None) -> None:
    fields = {**DENSE, "q_lora_rank": query_rank}
    dense = make_twins(tmp_path, *FORMATS["gptq"], **fields).dense
    modules = {
        "self_attn.q_proj" if query_rank is None else "self_attn.q_b_proj": (128, 64),
        "self_attn.kv_a_proj_with_mqa": (72, 64),
        "self_attn.kv_b_proj": (160, 64),
        "self_attn.o_proj": (64, 64),
    }
    one = logits_of_ranks(dense, tmp_path / "one", [WHOLE], "cpu", modules)
    two = logits_of_ranks(dense, tmp_path / "two", RANKS, "cpu", modules)
    assert (two - one).abs().max() < TOLERANCE * one.abs().max()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("qk_rope_head_dim", 7, "qk_rope_head_dim is 7; it must be even"),
        ("qk_nope_head_dim", 23, "qk_nope_head_dim is 23; it must be even"),
        ("v_head_dim", 33, r"v_head_dim is 33; it must be at most qk_nope_head_dim \+ qk_rope_head_dim \(32\)"),
        ("scoring_func", "softmax", "scoring_func is 'softmax'; it must be 'sigmoid'"),
        ("topk_method", "greedy", "topk_method is 'greedy'; it must be one of noaux_tc"),
        ("moe_layer_freq", 2, "moe_layer_freq is 2; it must be 1"),
        ("topk_group", 3, r"topk_group is 3; it must be at most n_group \(2\)"),
    ],
)
def test_nonsense_is_named(field: str, value: object, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        parse_model_config({**MODEL, **EXPERTS, field: value}, "config.json")


def test_every_size_of_what_turns_is_kept() -> None:
    for head_dim in range(4, 257, 2):
        for turned in range(2, head_dim + 1, 2):
            assert Rope(1e4, part=part_of_head(turned, head_dim)).dims(head_dim) == turned


def test_the_table_has_what_turns_alone() -> None:
    rope = parse_model_config({**MODEL, **EXPERTS}, "config.json").layers[0].rope
    assert cos_sin_table(rope, 32, 5, torch.device("cpu")).shape == (5, 2, 4)
