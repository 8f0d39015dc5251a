"""DeepSeek V2 and V3: heads made from latents, experts chosen within groups, shared ones, dense first layers."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import with_experts
from loraplex_engine.models.glm4_moe import behind_dense_layers, group_mixture
from loraplex_engine.models.latent import latent_config
from loraplex_engine.models.reading import Family

_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
DEFAULTS_2 = {
    **_DEFAULTS,
    "max_position_embeddings": 2048,
    "intermediate_size": 11_008,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "eos_token_id": 2,
}
DEFAULTS_3 = {
    **_DEFAULTS,
    "max_position_embeddings": 4096,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rope_interleave": True,
    "eos_token_id": 1,
}


def read_2(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS_2)
    _check(fields, "softmax", ("greedy", "group_limited_greedy"))
    if fields.flag("norm_topk_prob"):
        raise fields.error("norm_topk_prob", True, "false: transformers passes over it, and no published model has it")
    if fields.text("topk_method") == "greedy":
        fields = fields.changed_by(ConfigFields({"n_group": None, "topk_group": None}, fields.where))
    mixture = group_mixture(fields)
    mixture = replace(mixture, correction=None, routing=replace(mixture.routing, score="softmax", group_best=1))
    return _with_experts(latent_config(architecture, fields, interleaved=True), fields, mixture)


def read_3(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS_3)
    _check(fields, "sigmoid", ("noaux_tc",))
    config = latent_config(architecture, fields, interleaved=fields.flag("rope_interleave"))
    return _with_experts(config, fields, group_mixture(fields))


def _with_experts(config: ModelConfig, fields: ConfigFields, mixture: MixtureLayout) -> ModelConfig:
    guesses = (f"model.layers.{config.num_layers}.",)  # further tokens
    return with_experts(replace(config, unused_tensors=guesses), mixture, behind_dense_layers(fields))


def _check(fields: ConfigFields, score: str, methods: tuple[str, ...]) -> None:
    """Raise ModelError for a choice of experts that the model's class does not know."""
    if fields.text("scoring_func") != score:
        raise fields.error("scoring_func", fields.text("scoring_func"), repr(score))
    if fields.text("topk_method") not in methods:
        raise fields.error("topk_method", fields.text("topk_method"), f"one of {', '.join(methods)}")
    if fields.integer("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", fields.integer("moe_layer_freq"), "1")


FAMILY_2 = Family(("DeepseekV2ForCausalLM",), ("deepseek_v2",), read_2)
FAMILY_3 = Family(("DeepseekV3ForCausalLM",), ("deepseek_v3", "kimi_k2"), read_3)
