"""GLM 4.5 to 4.7: experts chosen within groups, a feed-forward over every token beside them, dense first layers."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts, with_experts
from loraplex_engine.models.reading import Family, decoder_config, gate_activation
from loraplex_engine.models.rope_reading import read_partial_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    num_layers = fields.integer("num_hidden_layers")
    layers = (LayerAttention(read_partial_rope(fields, default_part=0.5)),) * num_layers
    config = replace(
        decoder_config(architecture, fields, layers),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm=fields.flag("use_qk_norm"),
        unused_tensors=(f"model.layers.{num_layers}.",),  # guesses further tokens
    )
    return with_experts(config, group_mixture(fields), behind_dense_layers(fields))


def behind_dense_layers(fields: ConfigFields) -> tuple[bool, ...]:
    dense = fields.integer("first_k_dense_replace", minimum=0)
    return tuple(layer >= dense for layer in range(fields.integer("num_hidden_layers")))


def group_mixture(fields: ConfigFields) -> MixtureLayout:
    """Experts whose scores are sigmoids, chosen with a correction within groups."""
    num_experts = number_of_experts(fields, "n_routed_experts")
    groups, kept = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    if num_experts % groups or (groups > 1 and num_experts // groups < 2):
        raise fields.error("n_group", groups, f"a number of groups of at least 2 of the {num_experts} experts")
    per_token = experts_per_token(fields, kept * num_experts // groups)
    if kept > groups:
        raise fields.error("topk_group", kept, f"at most n_group ({groups})")
    size, activation = fields.integer("moe_intermediate_size"), gate_activation(fields)
    shared = fields.integer("n_shared_experts", minimum=0)
    return MixtureLayout(
        num_experts,
        GatedLayout(size, activation, module="mlp.experts"),
        Routing(
            per_token,
            "sigmoid",
            normalised=fields.flag("norm_topk_prob"),
            least_sum=1e-20,
            scale=fields.number("routed_scaling_factor", 1.0),
            groups=groups,
            groups_kept=kept,
        ),
        float32_router=True,
        correction="mlp.gate.e_score_correction_bias",
        shared=GatedLayout(size * shared, activation, module="mlp.shared_experts", site="shared.") if shared else None,
    )


FAMILY = Family(("Glm4MoeForCausalLM",), ("glm4_moe",), read)
