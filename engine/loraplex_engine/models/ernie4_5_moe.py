"""ERNIE 4.5 with experts, chosen with a correction, beside feed-forwards over every token."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models import ernie4_5
from loraplex_engine.models.experts import experts_per_token, number_of_experts, with_experts
from loraplex_engine.models.reading import Family, gate_activation
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
IN_TRANSFORMERS_5 = (("mlp.gate.moe_statics", "mlp.moe_statics"),)
FURTHER_TOKENS = ("model.mtp_block.", "model.mtp_emb_norm.", "model.mtp_hidden_norm.", "model.mtp_linear_proj.")


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if fields.flag("use_bias"):
        raise fields.error("use_bias", True, "false: the head would have one, too, and is computed without")
    config = replace(ernie4_5.read(architecture, fields), aliases=IN_TRANSFORMERS_5, unused_tensors=FURTHER_TOKENS)
    return with_experts(config, _mixture(fields), _sparse_layers(fields))


def _mixture(fields: ConfigFields) -> MixtureLayout:
    num_experts, size = number_of_experts(fields, "moe_num_experts"), fields.integer("moe_intermediate_size")
    activation = gate_activation(fields.with_defaults(ernie4_5.DEFAULTS))
    shared = size * fields.integer("moe_num_shared_experts", minimum=0)
    return MixtureLayout(
        num_experts,
        GatedLayout(size, activation, module="mlp.experts"),
        Routing(experts_per_token(fields, num_experts, "moe_k"), least_sum=fields.number("moe_norm_min")),
        float32_router=True,
        correction="mlp.moe_statics.e_score_correction_bias",
        correction_shape=(1, num_experts),
        shared=GatedLayout(shared, activation, module="mlp.shared_experts", site="shared.") if shared else None,
    )


def _sparse_layers(fields: ConfigFields) -> tuple[bool, ...]:
    num_layers, interval = fields.integer("num_hidden_layers"), fields.integer("moe_layer_interval")
    first = fields.integer("moe_layer_start_index", minimum=0)
    stated = fields.integer("moe_layer_end_index", minimum=-1)
    last = num_layers - 1 if stated == -1 else stated
    return tuple((layer + 1) % interval == 0 and first <= layer <= last for layer in range(num_layers))


FAMILY = Family(("Ernie4_5_MoeForCausalLM",), ("ernie4_5_moe",), read)
