"""EXAONE 4: norms behind attention and feed-forward, and on query and key heads; beside layers with windows, those
without have no rotation."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import NORMS_BEHIND, LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, all_but_every, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_key_value_heads": 32,
    "eos_token_id": 2,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    window, rope = fields.optional_integer("sliding_window"), read_rope(fields)
    num_layers = fields.integer("num_hidden_layers")
    pattern = (False,) * num_layers
    if window is not None:
        pattern = _pattern(fields, num_layers)
    layers = tuple(
        LayerAttention(rope if slides or window is None else None, window if slides else None)
        for slides in sliding_layers(fields, pattern)
    )
    return replace(decoder_config(architecture, fields, layers), qk_norm=True, norms=NORMS_BEHIND)


def _pattern(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """The first files spell it "LLLG", a letter for each layer of a group, and state the layers' types beside it."""
    if fields.texts("layer_types"):
        return (False,) * num_layers  # not looked at
    return all_but_every(fields.integer("sliding_window_pattern"), num_layers)


FAMILY = Family(("Exaone4ForCausalLM",), ("exaone4",), read)
