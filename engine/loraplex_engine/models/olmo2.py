"""OLMo 2 and 3: norms behind attention and feed-forward alone, and over whole queries and keys; OLMo 3 with windows."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import NORMS_BEHIND, LayerAttention, ModelConfig
from loraplex_engine.models.gemma3 import read_ropes
from loraplex_engine.models.reading import Family, all_but_every, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "eos_token_id": 50_279}
DEFAULTS_3 = {**DEFAULTS, "sliding_window": 4096, "rope_theta": 500_000.0}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    return olmo_config(architecture, fields, layers)


def read_3(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS_3)
    window = fields.optional_integer("sliding_window")
    global_rope, local_rope = read_ropes(fields, fields.number("rope_theta"))
    pattern = all_but_every(4, fields.integer("num_hidden_layers"))
    layers = tuple(
        LayerAttention(local_rope if slides else global_rope, window if slides else None)
        for slides in sliding_layers(fields, pattern)
    )
    return olmo_config(architecture, fields, layers)


def olmo_config(architecture: str, fields: ConfigFields, layers: tuple[LayerAttention, ...]) -> ModelConfig:
    """What both versions have in common."""
    bias = fields.flag("attention_bias")
    config = decoder_config(architecture, fields, layers)
    return replace(config, qkv_bias=bias, o_bias=bias, projection_norm=True, norms=NORMS_BEHIND)


FAMILY = Family(("Olmo2ForCausalLM",), ("olmo2",), read)
FAMILY_3 = Family(("Olmo3ForCausalLM",), ("olmo3",), read_3)
