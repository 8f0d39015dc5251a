"""Helium: Llama's layers, with neighbours turned together."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-8,
    "max_position_embeddings": 4096,
    "head_dim": 128,
    "eos_token_id": 2,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    rope = replace(read_rope(fields, 100_000.0), interleaved=True)
    layers = (LayerAttention(rope),) * fields.integer("num_hidden_layers")
    config = decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias"))
    return replace(config, qkv_bias=fields.flag("attention_bias"))


FAMILY = Family(("HeliumForCausalLM",), ("helium",), read)
