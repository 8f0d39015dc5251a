"""Granite 3 with experts: Granite's multipliers; the matrices of all experts are one tensor."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout, GatedNames
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models import granite
from loraplex_engine.models.experts import experts_per_token, number_of_experts, with_experts
from loraplex_engine.models.reading import Family, gate_activation
from loraplex_kernels.ops import Routing

DEFAULTS = {**granite.DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
IN_CHECKPOINTS = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
)
SHARED_NAMES = GatedNames("gate_proj", "up_proj", "output_linear", "input_linear")


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = granite.read(architecture, fields)
    activation, num_experts = gate_activation(fields), number_of_experts(fields, "num_local_experts", "num_experts")
    expert = GatedLayout(fields.integer("intermediate_size"), activation, module="block_sparse_moe.experts")
    mixture = MixtureLayout(
        num_experts,
        expert,
        Routing(experts_per_token(fields, num_experts)),
        router="block_sparse_moe.router",
        shared=_shared(architecture, fields),
        stacked=True,
    )
    return replace(with_experts(config, mixture, (True,) * config.num_layers), aliases=IN_CHECKPOINTS)


def _shared(architecture: str, fields: ConfigFields) -> GatedLayout | None:
    size = fields.integer("shared_intermediate_size", 0, minimum=0)
    if not size or architecture == "GraniteMoeForCausalLM":
        return None
    activation = gate_activation(fields)
    return GatedLayout(size, activation, stored_fused=True, module="shared_mlp", names=SHARED_NAMES, site="shared.")


FAMILY = Family(("GraniteMoeForCausalLM",), ("granitemoe",), read)
FAMILY_SHARED = Family(("GraniteMoeSharedForCausalLM",), ("granitemoeshared",), read)
