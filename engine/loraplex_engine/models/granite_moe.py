"""Granite 3 with experts: Granite's multipliers; the matrices of all experts are one tensor. Granite 4, of whose models
those are computed whose layers all attend."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import GatedLayout, GatedNames
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models import granite
from loraplex_engine.models.experts import experts_per_token, number_of_experts, with_experts
from loraplex_engine.models.reading import Family, gate_activation
from loraplex_engine.models.refused import STATES
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
        shared=None if architecture == "GraniteMoeForCausalLM" else _shared(fields),
        stacked=True,
    )
    return replace(with_experts(config, mixture, (True,) * config.num_layers), aliases=IN_CHECKPOINTS)


def _shared(fields: ConfigFields) -> GatedLayout | None:
    size, activation = fields.integer("shared_intermediate_size", 0, minimum=0), gate_activation(fields)
    if not size:
        return None
    return GatedLayout(size, activation, stored_fused=True, module="shared_mlp", names=SHARED_NAMES, site="shared.")


def _dense(config: ModelConfig, shared: GatedLayout | None, fields: ConfigFields) -> ModelConfig:
    """The config with the feed-forward that others share as the only one."""
    if shared is None:
        raise fields.error("shared_intermediate_size", 0, "positive where there are no experts")
    return replace(config, feed_forwards=(replace(shared, site=""),) * config.num_layers)


def read_4(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults({**DEFAULTS, "shared_intermediate_size": 1024})
    others = sorted(set(fields.texts("layer_types") or ("mamba",)) - {"attention", "full_attention"})
    if others:
        raise fields.error("layer_types", others, f"attention alone: {STATES}. Choose a Granite without")
    if fields.integer("num_local_experts", minimum=0):
        config = read(architecture, fields)
    else:
        config = _dense(granite.read(architecture, fields), _shared(fields), fields)
    if fields.has("position_embedding_type") and fields.text("position_embedding_type") == "rope":
        return config
    return replace(config, layers=(LayerAttention(None),) * config.num_layers)


FAMILY = Family(("GraniteMoeForCausalLM",), ("granitemoe",), read)
FAMILY_SHARED = Family(("GraniteMoeSharedForCausalLM",), ("granitemoeshared",), read)
FAMILY_4 = Family(("GraniteMoeHybridForCausalLM",), ("granitemoehybrid",), read_4)
