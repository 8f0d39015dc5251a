"""Seed-OSS: Llama's layers, with biases on query, key and value alone unless the file says otherwise."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 524_288,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "eos_token_id": 2,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    config = decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias"))
    return replace(config, qkv_bias=fields.flag("attention_bias", True), o_bias=fields.flag("attention_out_bias"))


FAMILY = Family(("SeedOssForCausalLM",), ("seed_oss",), read)
