"""Apertus: Llama's attention with norms on heads, and a feed-forward without a gate, whose activation is trained."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, LayerNorms, ModelConfig
from loraplex_engine.layers.feed_forward import PlainLayout
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope, with_default_rope

DEFAULTS = {"hidden_act": "xielu", "rms_norm_eps": 1e-5, "max_position_embeddings": 65_536, "eos_token_id": 2}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = with_default_rope(fields.with_defaults(DEFAULTS), ROPE)
    if fields.text("hidden_act") != "xielu":
        raise fields.error("hidden_act", fields.text("hidden_act"), "xielu")
    layers = (LayerAttention(read_rope(fields, 12e6)),) * fields.integer("num_hidden_layers")
    plain = PlainLayout(fields.integer("intermediate_size"), "xielu")
    bias = fields.flag("attention_bias")
    return replace(
        decoder_config(architecture, fields, layers, feed_forward=plain),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        norms=LayerNorms("attention_layernorm", "feedforward_layernorm"),
    )


FAMILY = Family(("ApertusForCausalLM",), ("apertus",), read)
