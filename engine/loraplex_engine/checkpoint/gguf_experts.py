"""The experts of GGUF files: how their parts are called there, and what the files say of them.

One tensor holds a matrix of all experts of a layer, [E, N, C]. Each is read by itself, by its name in the Hugging Face
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loraplex_engine.checkpoint.config_fields import ConfigFields

MAX_MATRICES = 1 << 18  # of all experts: the largest models have a third of it
SOFTMAX = (0, 1)  # as scores; the first is what files without the field have
SCALES = (0.0, 1.0)


class ExpertNames(NamedTuple):
    """Paths inside a layer."""

    module: str
    router: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None  # the rows of gate and up are one matrix's, one of each in turn
    shared: str | None = None
    shared_gate: str = ""


EXPERTS: Mapping[str, ExpertNames] = {
    "llama": ExpertNames("block_sparse_moe.experts", "block_sparse_moe.gate", "w1", "w3", "w2"),
    "qwen2moe": ExpertNames(
        "mlp.experts", "mlp.gate", shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"
    ),
    "qwen3moe": ExpertNames("mlp.experts", "mlp.gate"),
    "olmoe": ExpertNames("mlp.experts", "mlp.gate"),
    "granitemoe": ExpertNames("block_sparse_moe.experts", "block_sparse_moe.router"),
    "gpt-oss": ExpertNames("mlp.experts", "mlp.router", gate_up="gate_up_proj"),
}
PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def beside_experts(architecture: str) -> dict[str, str]:
    """The other parts of their layers, by their names in GGUF."""
    names = EXPERTS.get(architecture)
    if names is None:
        return {}
    found = {"ffn_gate_inp": names.router}
    if names.shared is not None:
        shared = {f"ffn_{part}_shexp": f"{names.shared}.{part}_proj" for part in ("gate", "up", "down")}
        found |= {**shared, "ffn_gate_inp_shexp": names.shared_gate}
    return found


def expert_path(names: ExpertNames, part: str, index: int) -> str:
    """The path inside a layer of one expert's matrix; part: one of PARTS."""
    own = {"ffn_gate_exps": names.gate, "ffn_up_exps": names.up, "ffn_down_exps": names.down}[part]
    if names.gate_up is not None and own != names.down:
        own = names.gate_up
    return f"{names.module}.{index}.{own}"


def expert_config(fields: ConfigFields, normalised: bool) -> dict[str, object]:
    """The fields of experts in the spelling of config.json.  normalised: whether the weights of a token's experts are
    divided by their sum. Raises ModelError where the file states something else than is computed."""
    if fields.integer("expert_gating_func", 0, minimum=0) not in SOFTMAX:
        raise fields.error("expert_gating_func", fields.integer("expert_gating_func"), "1, a softmax of the scores")
    scale = fields.number_or_zero("expert_weights_scale")
    if scale not in SCALES:
        raise fields.error("expert_weights_scale", scale, "1")
    if fields.flag("expert_weights_norm", normalised) != normalised:
        raise fields.error("expert_weights_norm", not normalised, f"{str(normalised).lower()}, which is computed")
    count = fields.integer("expert_count")
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "norm_topk_prob": normalised,
        "moe_intermediate_size": fields.optional_integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": fields.optional_integer("expert_shared_feed_forward_length"),
    }
