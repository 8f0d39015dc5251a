"""Adapters on experts, in each form that PEFT writes or reads, beside each other and the base in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.reference.peft_oracle import SHAPE, Engine, Oracle, random_prompt, randomised, read_base
from tests.reference.test_model_logits import WITH_IMAGES

transformers = pytest.importorskip("transformers")

NUM_EXPERTS = 5
GROUPS: dict[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    **GROUPS,
    "num_key_value_heads": SHAPE["num_attention_heads"],
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}
LATENTS = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj gate_proj up_proj down_proj"
# Further families: the names of their routers, and of linears beside the experts or (what PEFT makes of them) of these.
OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "Qwen2Moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
        "mlp.gate.weight",
        "shared_expert_gate",
    ),
    "GptOss": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "mlp.router.weight",
        "k_proj",
    ),
    "MiniMaxM2": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 4},
        "mlp.gate.weight",
        "k_proj",
    ),
    "Phimoe": (
        {"num_local_experts": 4, "router_jitter_noise": 0.3, "attention_bias": True, "lm_head_bias": True},
        "mlp.router.weight",
        "k_proj",
    ),
    "DeepseekV2": ({**LATENT, "topk_method": "group_limited_greedy"}, "mlp.gate.weight", LATENTS),
    "DeepseekV3": (LATENT, "mlp.gate.weight", LATENTS),
    "Llama4": (
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_chunk_size": 16},
        "feed_forward.router.weight",
        "shared_expert.down_proj up_proj",
    ),
    "Olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, "mlp.gate.weight", "k_proj"),
    "GraniteMoeShared": (
        {"num_local_experts": 4, "shared_intermediate_size": 24},
        "block_sparse_moe.router.weight",
        "input_linear",
    ),
    "Glm4Moe": ({**GROUPS, "head_dim": 8}, "mlp.gate.weight", "gate_proj up_proj down_proj"),
    "Ernie4_5_Moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False},
        "mlp.gate.weight",
        "v_proj",
    ),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 8,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "parameters": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []},
    "parameter": {"target_parameters": ["experts.down_proj"], "target_modules": ["v_proj"], "use_rslora": True},
    "other-parameter": {"target_parameters": ["experts.gate_up_proj"], "target_modules": [], "alpha_pattern": {}},
    "router": {
        "target_parameters": ["mlp.gate.weight", "experts.down_proj"],
        "target_modules": ["q_proj"],
        "rank_pattern": {"gate.weight": 2},
        "alpha_pattern": {"mlp.gate.weight": 9, "mlp.gate": 60},
    },
    "ranks": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": ["k_proj"],
        "rank_pattern": {"experts.gate_up_proj": 3, "k_proj": 2},
        "alpha_pattern": {"experts.down_proj": 9},
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    oracle = make_oracle(folder, family, FAMILIES[family], KINDS)
    names = ("w1", "w3", "w2") if family == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    write_per_expert(folder / "per-expert", oracle, names)
    oracle.read("per-expert")
    return oracle


def make_oracle(folder: Path, family: str, fields: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> Oracle:
    text = "Text" if family in WITH_IMAGES else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**SHAPE, **fields})
    randomised(getattr(transformers, f"{family}ForCausalLM")(config), 0).save_pretrained(folder / "base")
    oracle = Oracle(folder, {None: None}, {None: read_base(folder / "base")})
    for seed, (name, kind) in enumerate(kinds.items(), start=1):
        oracle.add(name, kind, seed)
    return oracle


def write_per_expert(folder: Path, oracle: Oracle, names: tuple[str, str, str]) -> None:
    """An adapter as it was written for a model whose experts are modules of their own."""
    config = oracle.models[None].config
    family = type(oracle.models[None]).__name__
    block = "block_sparse_moe" if family.startswith("Mixtral") else "mlp"
    size = config.intermediate_size if block == "block_sparse_moe" else config.moe_intermediate_size
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, Tensor] = {}
    for expert in range(NUM_EXPERTS):
        shapes = zip(names, ((size, config.hidden_size),) * 2 + ((config.hidden_size, size),), strict=True)
        for name, (out_features, in_features) in shapes:
            path = f"base_model.model.model.layers.1.{block}.experts.{expert}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(3, in_features, generator=generator) * 0.15
            tensors[f"{path}.lora_B.weight"] = torch.randn(out_features, 3, generator=generator) * 0.15
    folder.mkdir()
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": [*names]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module", params=["reference", "cpu"])
def engine(request: pytest.FixtureRequest, oracle: Oracle) -> Iterator[Engine]:
    engine = Engine(oracle, max_num_batched_tokens=16, kernels=request.param)
    yield engine
    engine.core.close()


def test_adapters_in_one_batch_equal_peft(engine: Engine) -> None:
    check_beside_each_other(engine)


def test_a_row_of_the_base_has_the_same_bits_beside_adapters(oracle: Oracle) -> None:
    engine = Engine(oracle, max_num_batched_tokens=64, kernels="cpu", enable_prefix_caching=False)
    try:
        alone = engine.add(random_prompt(9, 1), None, 1)
        engine.finish()
        for index, adapter in enumerate(KINDS):
            engine.add(random_prompt(3 + index, index), adapter, 2)
        beside = engine.add(random_prompt(9, 1), None, 1)
        engine.finish()
        assert torch.equal(engine.sampler.logits[alone][0], engine.sampler.logits[beside][0])
    finally:
        engine.core.close()


@pytest.mark.parametrize("family", OTHERS)
def test_adapters_of_other_families_equal_peft(family: str, tmp_path: Path) -> None:
    fields, router, linears = OTHERS[family]
    parameters = ["experts.gate_up_proj", "experts.down_proj", router]
    kinds = {
        "experts": {"target_parameters": parameters, "target_modules": ["q_proj"]},
        "linears": {"target_modules": [*linears.split(), "o_proj"]},
    }
    engine = Engine(make_oracle(tmp_path, family, fields, kinds), max_num_batched_tokens=16, kernels="cpu")
    try:
        check_beside_each_other(engine)
    finally:
        engine.core.close()


def check_beside_each_other(engine: Engine) -> None:
    adapters = [name for name in engine.oracle.keys if name is not None]
    for index, adapter in enumerate([None, *adapters, *reversed(adapters)]):
        engine.add(random_prompt(5 + index * 7 % 19, index), adapter, 3 + index % 4)
    engine.finish()
    engine.check()
