"""Llama 2 and 3, and the many models that took over their shape."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}

DEFAULTS_INTERNLM3 = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "eos_token_id": 2,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    config = decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias"))
    return replace(config, qkv_bias=bias, o_bias=bias)


def read_internlm3(architecture: str, fields: ConfigFields) -> ModelConfig:
    """InternLM 3, whose files call the biases otherwise."""
    fields = fields.with_defaults(DEFAULTS_INTERNLM3)
    bias = fields.flag("bias", fields.flag("mlp_bias"))
    qkv_bias = fields.flag("qkv_bias", fields.flag("attention_bias"))
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    return replace(decoder_config(architecture, fields, layers, mlp_bias=bias), qkv_bias=qkv_bias, o_bias=bias)


FAMILY_INTERNLM3 = Family(("InternLM3ForCausalLM",), ("internlm3",), read_internlm3)
# The second spelling is that of the first converted Llama checkpoints.
FAMILY = Family(("LlamaForCausalLM", "LLaMAForCausalLM"), ("llama",), read)
