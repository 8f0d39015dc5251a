"""Gemma 3, text: norms on query and key heads, five local layers to a global one, each kind with its own rotation."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig, Rope
from loraplex_engine.models.gemma2 import gemma_config
from loraplex_engine.models.reading import Family, all_but_every, sliding_layers
from loraplex_engine.models.rope_reading import rope_from

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,  # of the global layers
    "rope_local_base_freq": 10_000.0,
}


def read_ropes(fields: ConfigFields, local_theta: float) -> tuple[Rope, Rope]:
    """The rotary embeddings of global and local layers. `rope_scaling`, the older spelling, changes the global ones."""
    global_theta = fields.number("rope_theta")
    nested = fields.filled_section("rope_parameters")
    full = sliding = None
    if nested is not None:
        full, sliding = nested.section("full_attention"), nested.section("sliding_attention")
        if full is None and sliding is None:
            raise nested.error("full_attention and sliding_attention", None, "an object each, with a rope_theta")
    scaling = fields.filled_section("rope_scaling")
    if scaling is not None:
        full = scaling if full is None else full.changed_by(scaling)
    return (
        Rope(global_theta) if full is None else rope_from(full, fields, global_theta),
        Rope(local_theta) if sliding is None else rope_from(sliding, fields, local_theta),
    )


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    window = fields.optional_integer("sliding_window")
    pattern = all_but_every(fields.integer("sliding_window_pattern"), fields.integer("num_hidden_layers"))
    global_rope, local_rope = read_ropes(fields, fields.number("rope_local_base_freq"))
    layers = tuple(
        LayerAttention(local_rope if slides else global_rope, window if slides else None)
        for slides in sliding_layers(fields, pattern)
    )
    return replace(
        gemma_config(architecture, fields, layers),
        max_position_embeddings=fields.integer("max_position_embeddings"),  # which has the scaling in it
        qk_norm=True,
    )


FAMILY = Family(("Gemma3ForCausalLM",), ("gemma3_text",), read)
