"""Mistral: Llama's shape, every layer looking through a sliding window (the first version; null later), or those that
`layer_types` names (Ministral). Ministral 3's queries grow with their position."""

from __future__ import annotations

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig, QueryGrowth
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope, with_default_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
DEFAULTS_3 = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262_144,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "eos_token_id": 2,
}
ROPE_3 = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    rope, window = read_rope(fields), fields.optional_integer("sliding_window")
    pattern = (True,) * fields.integer("num_hidden_layers")
    layers = tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))
    return decoder_config(architecture, fields, layers)


def read_3(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = with_default_rope(fields.with_defaults(DEFAULTS_3), ROPE_3)
    layer = LayerAttention(read_rope(fields), fields.optional_integer("sliding_window"), growth=_growth(fields))
    return decoder_config(architecture, fields, (layer,) * fields.integer("num_hidden_layers"))


def _growth(fields: ConfigFields) -> QueryGrowth | None:
    section = fields.filled_section("rope_scaling") or fields.filled_section("rope_parameters")
    if section is None or not section.has("llama_4_scaling_beta"):
        return None
    return QueryGrowth(section.number("llama_4_scaling_beta"), section.integer("original_max_position_embeddings"))


FAMILY_3 = Family(("Ministral3ForCausalLM",), ("ministral3",), read_3)
FAMILY = Family(("MistralForCausalLM", "MinistralForCausalLM"), ("mistral", "ministral"), read)
