"""Small models of families that transformers' own classes compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

VOCAB = 151
LENGTH = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}
FALCON: dict[str, Any] = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}


def of(name: str, shape: dict[str, Any] = SHAPE, suffix: str = "ForCausalLM", **changes: Any) -> Any:
    """A model of a family by its name in transformers."""
    config = getattr(transformers, f"{name}Config")(**{**shape, **changes})
    return getattr(transformers, f"{name}{suffix}")(config)


BORROWED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: of("GPT2", GPT, "LMHeadModel"),
    "gpt2_scaled_by_layer": lambda: of("GPT2", GPT, "LMHeadModel", scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": lambda: of("GPTNeoX"),
    "opt": lambda: of("OPT", ffn_dim=64, word_embed_proj_dim=48),
    "opt_projected": lambda: of("OPT", ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False),
    "bloom": lambda: of("Bloom", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon": lambda: of("Falcon", FALCON),
    "falcon_grouped": lambda: of("Falcon", FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_alibi": lambda: of("Falcon", FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "gptj": lambda: of("GPTJ", GPT, rotary_dim=8),
    "codegen": lambda: of("CodeGen", GPT, rotary_dim=8),
    "gpt_bigcode": lambda: of("GPTBigCode", GPT),
    "gpt_neo": lambda: of(
        "GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=5
    ),
    "mpt": lambda: of("Mpt", {"vocab_size": VOCAB, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": LENGTH}),
    "persimmon": lambda: of("Persimmon"),
    "phi": lambda: of("Phi"),
    "cohere": lambda: of("Cohere", GROUPED, use_qk_norm=True, logit_scale=0.3),
    "cohere2": lambda: of("Cohere2", GROUPED, num_hidden_layers=4, sliding_window=5),
    "nemotron": lambda: of("Nemotron", GROUPED, head_dim=12),
    "stablelm": lambda: of("StableLm", GROUPED, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    "starcoder2": lambda: of("Starcoder2", GROUPED, sliding_window=7),
    "olmo": lambda: of("Olmo", GROUPED, clip_qkv=8.0),
    "apertus": lambda: of("Apertus", GROUPED),
    "granite_swa": lambda: of("GraniteSWA", GROUPED, num_hidden_layers=4, sliding_window=5),
    "nanochat": lambda: of("NanoChat", GROUPED),
    "bitnet": lambda: of("BitNet", GROUPED),
    "biogpt": lambda: of("BioGpt"),
}
