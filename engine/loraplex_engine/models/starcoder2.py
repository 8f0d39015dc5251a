"""StarCoder 2: layer norms with biases, a feed-forward without a gate, biases everywhere, a sliding window."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import PlainLayout
from loraplex_engine.models.reading import Family, decoder_config, plain_activation
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 50_256,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    bias = fields.flag("use_bias", True)
    layer = LayerAttention(read_rope(fields), fields.optional_integer("sliding_window"))
    size, modules = fields.integer("intermediate_size"), ("mlp.c_fc", "mlp.c_proj")
    plain = PlainLayout(size, plain_activation(fields), bias, modules)
    layers, eps = (layer,) * fields.integer("num_hidden_layers"), fields.number("norm_epsilon")
    config = decoder_config(architecture, fields, layers, feed_forward=plain, norm_eps=eps)
    return replace(config, qkv_bias=bias, o_bias=bias, layer_norm=True, norm_bias=True)


FAMILY = Family(("Starcoder2ForCausalLM",), ("starcoder2",), read)
