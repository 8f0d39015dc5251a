"""Qwen 3 with experts: Qwen 3's attention, and experts in all layers but those that the file names."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts, sparse_layers, with_experts
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    layers = (LayerAttention(read_rope(fields), window),) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    config = replace(decoder_config(architecture, fields, layers), qkv_bias=bias, o_bias=bias, qk_norm=True)
    return with_experts(config, qwen_mixture(fields), sparse_layers(fields))


def qwen_mixture(fields: ConfigFields) -> MixtureLayout:
    num_experts = number_of_experts(fields, "num_local_experts", "num_experts")
    expert = GatedLayout(fields.integer("moe_intermediate_size"), gate_activation(fields), module="mlp.experts")
    normalised = fields.flag("norm_topk_prob")
    return MixtureLayout(num_experts, expert, Routing(experts_per_token(fields, num_experts), normalised=normalised))


FAMILY = Family(("Qwen3MoeForCausalLM",), ("qwen3_moe",), read)
