"""Qwen 1.5 and 2 with experts, beside which a feed-forward with a gate of its own goes over every token."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.models.experts import sparse_layers, with_experts
from loraplex_engine.models.qwen3_moe import qwen_mixture
from loraplex_engine.models.reading import Family, decoder_config, gate_activation, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 16,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = decoder_config(architecture, fields, _layers(fields))
    shared = GatedLayout(
        fields.integer("shared_expert_intermediate_size"),
        gate_activation(fields),
        module="mlp.shared_expert",
        site="shared.",
    )
    mixture = replace(qwen_mixture(fields), shared=shared, shared_gate="mlp.shared_expert_gate")
    return with_experts(replace(config, qkv_bias=fields.flag("qkv_bias", True)), mixture, sparse_layers(fields))


def _layers(fields: ConfigFields) -> tuple[LayerAttention, ...]:
    """Of the layers below a limit every other one slides, unless the file says otherwise."""
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    limit = fields.integer("max_window_layers", minimum=0)
    pattern = tuple(layer % 2 == 0 and layer < limit for layer in range(fields.integer("num_hidden_layers")))
    rope = read_rope(fields)
    return tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))


FAMILY = Family(("Qwen2MoeForCausalLM",), ("qwen2_moe",), read)
