"""Phi 3, 3.5 and 4: Llama's layers, with one tensor for query, key and value, and one for gate and up."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_partial_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "eos_token_id": 32_000,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layer = LayerAttention(read_partial_rope(fields), fields.optional_integer("sliding_window"))
    gated = GatedLayout(fields.integer("intermediate_size"), gate_activation(fields), stored_fused=True)
    layers = (layer,) * fields.integer("num_hidden_layers")
    return replace(decoder_config(architecture, fields, layers, feed_forward=gated), fused_tensors=True)


FAMILY = Family(("Phi3ForCausalLM",), ("phi3",), read)
