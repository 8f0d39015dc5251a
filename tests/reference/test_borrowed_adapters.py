"""Adapters of the usual kinds on models that transformers' own classes compute, beside each other in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reference.borrowed import BORROWED, LENGTH
from tests.reference.peft_oracle import Engine, Oracle, random_prompt, randomised, read_base

# Of each: a linear, another one, the embedding, a norm of the layers, the last norm.
MODULES: dict[str, tuple[str, str, str, str, str]] = {
    "gpt2": ("attn.c_proj", "c_attn", "wte", "ln_2", "ln_f"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h", "embed_in", "post_attention_layernorm", "final_layer_norm"),
    "opt_projected": ("fc1", "out_proj", "embed_tokens", "self_attn_layer_norm", "0.final_layer_norm"),
    "bloom": ("query_key_value", "dense_4h_to_h", "word_embeddings", "input_layernorm", "ln_f"),
    "falcon": ("query_key_value", "dense_h_to_4h", "word_embeddings", "input_layernorm", "ln_f"),
    "gptj": ("q_proj", "fc_out", "wte", "ln_1", "ln_f"),
    "gpt_bigcode": ("c_attn", "mlp.c_proj", "wte", "ln_2", "ln_f"),
    "mpt": ("Wqkv", "up_proj", "wte", "norm_1", "norm_f"),
    "phi": ("dense", "fc1", "embed_tokens", "input_layernorm", "final_layernorm"),
    "bitnet": ("q_proj", "down_proj", "embed_tokens", "attn_sub_norm", "model.norm"),
    "nanochat": ("q_proj", "fc1", "embed_tokens", "fc2", "lm_head"),  # its norms have no weights
    "persimmon": ("query_key_value", "dense_4h_to_h", "embed_tokens", "input_layernorm", "final_layernorm"),
}


def kinds(name: str) -> dict[str, dict[str, Any]]:
    linear, other, embedding, norm, last_norm = MODULES[name]
    return {
        "lora": {"target_modules": "all-linear", "use_rslora": True},
        "dora": {"target_modules": [linear, other], "use_dora": True},
        "biases": {"target_modules": [linear], "bias": "all", "lora_bias": True},
        "vocabulary": {"target_modules": [embedding, "lm_head", other]},
        "saved": {"target_modules": [linear], "modules_to_save": [other, norm, last_norm]},
        "tokens": {"target_modules": [other], "trainable_token_indices": {embedding: [3, 5, 90]}},
    }


@pytest.mark.parametrize("name", MODULES)
def test_adapters_in_one_batch_equal_peft(name: str, tmp_path: Path) -> None:
    randomised(BORROWED[name](), 0).save_pretrained(tmp_path / "base")
    base = read_base(tmp_path / "base")
    oracle = Oracle(tmp_path, {None: None}, {None: base})
    for seed, (kind, fields) in enumerate(kinds(name).items(), start=1):
        oracle.add(kind, fields, seed)
    engine = Engine(oracle, max_num_batched_tokens=16, max_model_len=LENGTH, implementation="transformers")
    try:
        for index, adapter in enumerate([None, *oracle.models, *reversed(oracle.models)]):
            engine.add(random_prompt(5 + index * 7 % 19, index), adapter, 3 + index % 4)
        engine.finish()
        engine.check()
    finally:
        engine.core.close()
