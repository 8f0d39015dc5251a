"""dots.llm1: Qwen 3's attention, and experts as GLM 4.5 has them."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.experts import with_experts
from loraplex_engine.models.glm4_moe import behind_dense_layers, group_mixture
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
    "max_window_layers": 62,
    "first_k_dense_replace": 0,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    window, first = fields.optional_integer("sliding_window"), fields.integer("max_window_layers", minimum=0)
    pattern = tuple(layer >= first for layer in range(fields.integer("num_hidden_layers")))
    rope = read_rope(fields)
    layers = tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))
    bias = fields.flag("attention_bias")
    config = replace(decoder_config(architecture, fields, layers), qkv_bias=bias, o_bias=bias, qk_norm=True)
    return with_experts(config, group_mixture(fields), behind_dense_layers(fields))


FAMILY = Family(("Dots1ForCausalLM",), ("dots1",), read)
