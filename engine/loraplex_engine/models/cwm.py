"""Code World Model: Llama's layers, three of four with a window."""

from __future__ import annotations

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope, with_default_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": 8192,
    "eos_token_id": [128_001, 128_008, 128_009],
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = with_default_rope(fields.with_defaults(DEFAULTS), ROPE)
    window, rope = fields.optional_integer("sliding_window"), read_rope(fields, 1e6)
    pattern = tuple(layer % 4 != 0 for layer in range(fields.integer("num_hidden_layers")))
    layers = tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))
    return decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias"))


FAMILY = Family(("CwmForCausalLM",), ("cwm",), read)
