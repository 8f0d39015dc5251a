"""OLMoE: experts in every layer, and norms over whole queries and keys."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "eos_token_id": 50_279,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if fields.has("clip_qkv"):
        raise fields.error("clip_qkv", fields.number("clip_qkv"), "absent: no clipped projections are computed")
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    num_experts = number_of_experts(fields, "num_experts", "num_local_experts")
    expert = GatedLayout(fields.integer("intermediate_size"), gate_activation(fields), module="mlp.experts")
    routing = Routing(experts_per_token(fields, num_experts), normalised=fields.flag("norm_topk_prob"))
    config = decoder_config(architecture, fields, layers, feed_forward=MixtureLayout(num_experts, expert, routing))
    bias = fields.flag("attention_bias")
    return replace(config, qkv_bias=bias, o_bias=bias, projection_norm=True)


FAMILY = Family(("OlmoeForCausalLM",), ("olmoe",), read)
