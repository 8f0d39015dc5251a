"""Nemotron: layer norms whose weights are stored less 1, and a feed-forward of squares, without a gate."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import PlainLayout
from loraplex_engine.models.reading import Family, decoder_config, plain_activation
from loraplex_engine.models.rope_reading import read_partial_rope

DEFAULTS = {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 3}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_partial_rope(fields, 0.5)),) * fields.integer("num_hidden_layers")
    plain = PlainLayout(fields.integer("intermediate_size"), plain_activation(fields), fields.flag("mlp_bias"))
    config = decoder_config(architecture, fields, layers, feed_forward=plain, norm_eps=fields.number("norm_eps"))
    bias = fields.flag("attention_bias")
    return replace(config, qkv_bias=bias, o_bias=bias, layer_norm=True, norm_bias=True, norm_offset=1.0)


FAMILY = Family(("NemotronForCausalLM",), ("nemotron",), read)
