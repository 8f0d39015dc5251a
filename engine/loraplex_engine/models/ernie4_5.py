"""ERNIE 4.5: Llama's layers, with neighbours turned together."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    rope = replace(read_rope(fields, 500_000.0), interleaved=True)
    layers = (LayerAttention(rope),) * fields.integer("num_hidden_layers")
    bias = fields.flag("use_bias")
    return replace(decoder_config(architecture, fields, layers, mlp_bias=bias), qkv_bias=bias, o_bias=bias)


FAMILY = Family(("Ernie4_5ForCausalLM",), ("ernie4_5",), read)
