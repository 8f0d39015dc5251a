"""Mixtral: Mistral's attention, and experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout, GatedNames
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
}
EXPERT_NAMES = GatedNames("w1", "w3", "w2")
IN_TRANSFORMERS_5 = ((".mlp.", ".block_sparse_moe."),)


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    attention = LayerAttention(read_rope(fields, 1e6), fields.optional_integer("sliding_window"))
    layers = (attention,) * fields.integer("num_hidden_layers")
    num_experts = number_of_experts(fields, "num_local_experts", "num_experts")
    expert = GatedLayout(
        fields.integer("intermediate_size"),
        gate_activation(fields),
        module="block_sparse_moe.experts",
        names=EXPERT_NAMES,
    )
    mixture = MixtureLayout(
        num_experts, expert, Routing(experts_per_token(fields, num_experts)), router="block_sparse_moe.gate"
    )
    return replace(decoder_config(architecture, fields, layers, feed_forward=mixture), aliases=IN_TRANSFORMERS_5)


FAMILY = Family(("MixtralForCausalLM",), ("mixtral",), read)
