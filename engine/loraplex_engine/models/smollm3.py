"""SmolLM 3: Llama's layers, one of four without rotation."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, all_but_every, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "eos_token_id": 128_001,
    "no_rope_layer_interval": 4,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    rotated = rotated_layers(fields)
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    slides = sliding_layers(fields, tuple(not turns for turns in rotated))
    rope = read_rope(fields, 2e6)
    layers = tuple(
        LayerAttention(rope if turns else None, window if local else None)
        for turns, local in zip(rotated, slides, strict=True)
    )
    bias = fields.flag("attention_bias")
    config = decoder_config(architecture, fields, layers, mlp_bias=fields.flag("mlp_bias"))
    return replace(config, qkv_bias=bias, o_bias=bias)


def rotated_layers(fields: ConfigFields) -> tuple[bool, ...]:
    """Which layers have a rotation: whatever its name says, the list `no_rope_layers` has a 1 for those."""
    num_layers = fields.integer("num_hidden_layers")
    stated = fields.integers("no_rope_layers")
    if not stated:
        return all_but_every(fields.integer("no_rope_layer_interval"), num_layers)
    if len(stated) != num_layers or not set(stated) <= {0, 1}:
        raise fields.error("no_rope_layers", list(stated), f"a list of {num_layers} times 0 or 1")
    return tuple(each == 1 for each in stated)


FAMILY = Family(("SmolLM3ForCausalLM",), ("smollm3",), read)
