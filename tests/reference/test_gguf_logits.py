"""Every architecture that GGUF files name, against transformers: the same logits as from the files it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex_adapters.files import gguf_names
from loraplex_engine.checkpoint.gguf_config import ARCHITECTURES
from tests.gguf_files import write_gguf
from tests.reference.test_model_logits import (
    EXPERTS,
    GEMMA,
    LENGTHS,
    SINKS,
    YARN_ROPE,
    Stepper,
    assert_same,
    expected_logits,
    gemma3,
    llama,
    load,
    of,
    prompts,
    qwen2,
    qwen3,
    randomised,
)

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("llama", llama),
    "llama_tied": ("llama", lambda: llama(tie_word_embeddings=True, num_key_value_heads=6)),
    "llama_head_dim": (
        "llama",
        lambda: llama(head_dim=20, num_attention_heads=5, num_key_value_heads=1, hidden_size=45),
    ),
    "llama_biases": ("llama", lambda: llama(attention_bias=True, mlp_bias=True)),
    "llama_linear_rope": (
        "llama",
        lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ),
    "qwen2": ("qwen2", qwen2),
    "qwen3": ("qwen3", qwen3),
    "gemma": ("gemma", lambda: of("Gemma", head_dim=16)),
    "gemma2": ("gemma2", lambda: of("Gemma2", **{**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 6})),
    "gemma3": (
        "gemma3",
        lambda: gemma3(num_hidden_layers=6, query_pre_attn_scalar=16, final_logit_softcapping=None),
    ),
    "phi3": ("phi3", lambda: of("Phi3", sliding_window=7)),
    "phi3_part": ("phi3", lambda: of("Phi3", rope_parameters={"partial_rotary_factor": 0.75, "rope_theta": 1e4})),
    "smollm3": ("smollm3", lambda: of("SmolLM3", num_hidden_layers=4)),
    "granite": (
        "granite",
        lambda: of(
            "Granite",
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.4,
            logits_scaling=1.5,
        ),
    ),
    "olmo2": ("olmo2", lambda: of("Olmo2")),
    "olmo3": ("olmo2", lambda: of("Olmo3", num_hidden_layers=4, sliding_window=5)),
    "exaone4": ("exaone4", lambda: of("Exaone4", num_hidden_layers=4, sliding_window=5)),
    "glm4": ("glm4", lambda: of("Glm4", head_dim=12, eos_token_id=1, attention_bias=True)),
    "ernie": ("ernie4_5", lambda: of("Ernie4_5", head_dim=10)),
    "seed_oss": ("seed_oss", lambda: of("SeedOss", head_dim=10, attention_dropout=0.0)),
    "arcee": ("arcee", lambda: of("Arcee")),
    "mixtral": ("llama", lambda: of("Mixtral", num_local_experts=5, num_experts_per_tok=2)),
    "qwen2_moe": ("qwen2moe", lambda: of("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=40)),
    "qwen3_moe": ("qwen3moe", lambda: of("Qwen3Moe", **EXPERTS, head_dim=10, norm_topk_prob=True)),
    "olmoe": ("olmoe", lambda: of("Olmoe", num_experts=6, num_experts_per_tok=4)),
    "granite_moe": (
        "granitemoe",
        lambda: of("GraniteMoe", num_local_experts=5, residual_multiplier=0.3, logits_scaling=2.0),
    ),
    "gpt_oss": (
        "gpt-oss",
        lambda: of("GptOss", **{**SINKS, "rope_parameters": YARN_ROPE}, num_hidden_layers=4),
    ),
}


def test_every_architecture_is_tried() -> None:
    assert {architecture for architecture, _ in MODELS.values()} == set(ARCHITECTURES)


def test_adapters_are_read_for_the_architectures_that_models_are() -> None:
    assert set(gguf_names.ARCHITECTURES) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_model_that_was_converted(name: str, tmp_path: Path) -> None:
    architecture, make = MODELS[name]
    theirs = randomised(make())
    write_gguf(tmp_path / "model.gguf", theirs, architecture)
    stepper = Stepper(load(tmp_path / "model.gguf"), prompts())
    stepper.step(*enumerate(LENGTHS))
    assert_same(stepper.results(), expected_logits(theirs, prompts()))
