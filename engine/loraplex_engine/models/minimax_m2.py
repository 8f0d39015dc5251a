"""MiniMax M2: norms over whole queries and keys, a part of each head turned, experts chosen with a correction."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts
from loraplex_engine.models.mixtral import EXPERT_NAMES, IN_TRANSFORMERS_5
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import part_of_head, read_partial_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 196_608,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 5e6,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "eos_token_id": 200_020,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if fields.integer("shared_intermediate_size", 0, minimum=0):
        raise fields.error(
            "shared_intermediate_size", fields.integer("shared_intermediate_size"), "0: no published model shares one"
        )
    if fields.text("scoring_func", "sigmoid") != "sigmoid":
        raise fields.error("scoring_func", fields.text("scoring_func"), "'sigmoid', as in every published model")
    part = part_of_head(fields.integer("rotary_dim"), fields.integer("head_dim")) if fields.has("rotary_dim") else 1.0
    num_layers = fields.integer("num_hidden_layers")
    layers = (LayerAttention(read_partial_rope(fields, part)),) * num_layers
    return replace(
        decoder_config(architecture, fields, layers, feed_forward=_mixture(fields)),
        projection_norm=True,
        aliases=IN_TRANSFORMERS_5,
        unused_tensors=("model.mtp.", f"model.layers.{num_layers}."),  # guess further tokens
    )


def _mixture(fields: ConfigFields) -> MixtureLayout:
    num_experts = number_of_experts(fields, "num_local_experts", "num_experts")
    expert = GatedLayout(
        fields.integer("intermediate_size"),
        gate_activation(fields),
        module="block_sparse_moe.experts",
        names=EXPERT_NAMES,
    )
    return MixtureLayout(
        num_experts,
        expert,
        Routing(experts_per_token(fields, num_experts), "sigmoid"),
        router="block_sparse_moe.gate",
        correction="block_sparse_moe.e_score_correction_bias",
    )


FAMILY = Family(("MiniMaxM2ForCausalLM",), ("minimax_m2",), read)
