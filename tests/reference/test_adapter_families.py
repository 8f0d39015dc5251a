"""Adapters of the usual kinds, for models of each shape that the shared decoder has, beside each other in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reference.peft_oracle import SHAPE, Engine, Oracle, random_prompt, randomised, read_base

transformers = pytest.importorskip("transformers")

FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 6},
    "Ministral": {"sliding_window": 6, "head_dim": 8},
    "Qwen2": {},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    "Gemma": {"head_dim": 16},
    "Cwm": {"head_dim": 8, "sliding_window": 6},
    "SeedOss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "Arcee": {"mlp_bias": True},
    "Granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Olmo2": {"attention_bias": True},
    "Olmo3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
    "Phi3": {"rope_parameters": {"partial_rotary_factor": 0.75}},
    "Glm": {"head_dim": 8},
    "Glm4": {"head_dim": 12},
    "Ernie4_5": {"head_dim": 8},
    "Helium": {"head_dim": 8},
    "Starcoder2": {"sliding_window": 6},
    "Nemotron": {"head_dim": 8, "attention_bias": True},
    "StableLm": {"qk_layernorm": True, "use_qkv_bias": True},
    "Phi": {},
    "Cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "Cohere2": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "HunYuanDenseV1": {"head_dim": 8},
    "Ministral3": {"head_dim": 8},
    "Apertus": {},
    "MiniCPM3": {
        "num_key_value_heads": SHAPE["num_attention_heads"],
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
    },
}
# What families call otherwise, or what they have in place of it.
NAMES: dict[str, dict[str, str]] = {
    "Starcoder2": {"down_proj": "c_proj"},
    "Phi": {
        "o_proj": "dense",
        "down_proj": "fc2",
        "model.norm": "final_layernorm",
        "post_attention_layernorm": "input_layernorm",
    },
    "Apertus": {"post_attention_layernorm": "feedforward_layernorm"},
    "Cohere": {"post_attention_layernorm": "input_layernorm"},
    "Cohere2": {"post_attention_layernorm": "input_layernorm"},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "biases": {"target_modules": "all-linear", "bias": "all", "lora_bias": True},
    "vocabulary": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "saved": {"target_modules": ["o_proj"], "modules_to_save": ["down_proj", "model.norm", "post_attention_layernorm"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_in_one_batch_equal_peft(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomised(model, 0).save_pretrained(tmp_path / "base")
    oracle = Oracle(tmp_path, {None: None}, {None: read_base(tmp_path / "base")})
    for seed, (name, fields) in enumerate(KINDS.items(), start=1):
        oracle.add(name, _named(fields, NAMES.get(family, {})), seed)
    engine = Engine(oracle, max_num_batched_tokens=16)
    try:
        for index, adapter in enumerate([None, *KINDS, *reversed(KINDS)]):
            engine.add(random_prompt(5 + index * 7 % 19, index), adapter, 3 + index % 4)
        engine.finish()
        engine.check()
    finally:
        engine.core.close()


def _named(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {
        field: [names.get(each, each) for each in value] if isinstance(value, list) else value
        for field, value in fields.items()
    }
