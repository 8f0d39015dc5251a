"""Llama 2 and 3, and the many models that took over their shape."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    config = decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias"))
    return replace(config, qkv_bias=bias, o_bias=bias)


# The second spelling is that of the first converted Llama checkpoints.
FAMILY = Family(("LlamaForCausalLM", "LLaMAForCausalLM"), ("llama",), read)
