"""GLM 4, of 2024 and of 2025: half of each head is turned, neighbours together; gate and up are one tensor."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import NORMS_BEFORE, LayerAttention, LayerNorms, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_partial_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
NORMS = {
    "GlmForCausalLM": NORMS_BEFORE,
    "Glm4ForCausalLM": LayerNorms(
        "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
    ),
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    rope = read_partial_rope(fields, default_part=0.5, interleaved=True)
    layers = (LayerAttention(rope),) * fields.integer("num_hidden_layers")
    gated = GatedLayout(fields.integer("intermediate_size"), gate_activation(fields), stored_fused=True)
    config = decoder_config(architecture, fields, layers, feed_forward=gated)
    return replace(config, qkv_bias=fields.flag("attention_bias", True), norms=NORMS[architecture])


FAMILY = Family(("GlmForCausalLM",), ("glm",), read)
FAMILY_4 = Family(("Glm4ForCausalLM",), ("glm4",), read)
