"""Qwen 2 and 2.5: biases on query, key and value; a sliding window in the upper layers if it is switched on."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_layers(fields: ConfigFields) -> tuple[LayerAttention, ...]:
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    first = fields.integer("max_window_layers", minimum=0)
    pattern = tuple(layer >= first for layer in range(fields.integer("num_hidden_layers")))
    rope = read_rope(fields)
    return tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    return replace(decoder_config(architecture, fields, qwen_layers(fields)), qkv_bias=True)


FAMILY = Family(("Qwen2ForCausalLM",), ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), read)
