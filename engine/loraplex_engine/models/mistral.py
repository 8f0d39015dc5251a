"""Mistral: Llama's shape, every layer looking through a sliding window (the first version; null later), or those that
`layer_types` names (Ministral)."""

from __future__ import annotations

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    rope, window = read_rope(fields), fields.optional_integer("sliding_window")
    pattern = (True,) * fields.integer("num_hidden_layers")
    layers = tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))
    return decoder_config(architecture, fields, layers)


FAMILY = Family(("MistralForCausalLM", "MinistralForCausalLM"), ("mistral", "ministral"), read)
