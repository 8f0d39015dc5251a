"""Phi 3.5 with experts: layer norms, biases, and two experts of each token, each chosen and weighed by itself."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models import mixtral
from loraplex_engine.models.experts import experts_per_token, number_of_experts
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "eos_token_id": 2,
}
IN_TRANSFORMERS_5 = ((".mlp.router", ".block_sparse_moe.gate"), *mixtral.IN_TRANSFORMERS_5)


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    attention = LayerAttention(read_rope(fields, 1e6), fields.optional_integer("sliding_window"))
    layers = (attention,) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    return replace(
        decoder_config(architecture, fields, layers, feed_forward=_mixture(fields)),
        qkv_bias=bias,
        o_bias=bias,
        head_bias=fields.flag("lm_head_bias"),
        layer_norm=True,
        norm_bias=True,
        aliases=IN_TRANSFORMERS_5,
    )


def _mixture(fields: ConfigFields) -> MixtureLayout:
    num_experts = number_of_experts(fields, "num_local_experts", "num_experts")
    per_token = experts_per_token(fields, num_experts)
    if per_token != 2:
        raise fields.error("num_experts_per_tok", per_token, "2, as in every published model")
    expert = GatedLayout(
        fields.integer("intermediate_size"),
        gate_activation(fields),
        module="block_sparse_moe.experts",
        names=mixtral.EXPERT_NAMES,
    )
    routing = Routing(per_token, "softmax_of_near", normalised=False, near=2 * fields.number("router_jitter_noise"))
    return MixtureLayout(num_experts, expert, routing, router="block_sparse_moe.gate")


FAMILY = Family(("PhimoeForCausalLM", "PhiMoEForCausalLM"), ("phimoe",), read)
