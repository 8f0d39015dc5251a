"""Arcee: Llama's attention, and a feed-forward without a gate, whose activation is the square of what is positive."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import PlainLayout
from loraplex_engine.models.reading import Family, decoder_config, plain_activation
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 128_001}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    plain = PlainLayout(fields.integer("intermediate_size"), plain_activation(fields), fields.flag("mlp_bias"))
    bias = fields.flag("attention_bias")
    return replace(decoder_config(architecture, fields, layers, feed_forward=plain), qkv_bias=bias, o_bias=bias)


FAMILY = Family(("ArceeForCausalLM",), ("arcee",), read)
