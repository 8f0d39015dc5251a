"""Granite 3: Llama's layers, with multipliers of the embedding, the scores, what layers add, and the logits."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    return replace(
        decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias")),
        qkv_bias=bias,
        o_bias=bias,
        embedding_scale=fields.number("embedding_multiplier"),
        attention_scale=fields.number("attention_multiplier"),
        residual_scale=fields.number("residual_multiplier"),
        logits_scale=1.0 / fields.number("logits_scaling"),
    )


FAMILY = Family(("GraniteForCausalLM",), ("granite",), read)
