"""Hunyuan, dense: Llama's layers, with norms on query and key heads behind the rotation."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, LongRopeScaling, ModelConfig, Rope, YarnScaling
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "eos_token_id": 2}
MAX_ALPHA = 1e6  # published: 1000


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(_rope(fields)),) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    return replace(
        decoder_config(architecture, fields, layers),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        qk_norm_modules=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        qk_norm_rotated=True,
    )


def _rope(fields: ConfigFields) -> Rope:
    """What the files call dynamic is, with an α, a base that it stretches, whatever the length."""
    section = fields.filled_section("rope_scaling") or fields.filled_section("rope_parameters")
    if section is None or not _is_stretched(section):
        rope = read_rope(fields)
        if isinstance(rope.scaling, YarnScaling | LongRopeScaling):
            raise fields.error(
                "rope_scaling", "yarn or longrope", "one that keeps the length of heads: they are normed"
            )
        return rope
    dim = fields.integer("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads"))
    theta = section.number("rope_theta", fields.number("rope_theta", 10_000.0))
    alpha = section.number("alpha")
    if alpha > MAX_ALPHA:
        raise section.error("alpha", alpha, f"at most {MAX_ALPHA:g}")
    return Rope(theta * alpha ** (dim / max(dim - 2, 1)))


def _is_stretched(section: ConfigFields) -> bool:
    kind = section.text("rope_type" if section.has("rope_type") else "type", "default")
    return kind == "dynamic" and section.number_or_zero("alpha") > 0


FAMILY = Family(("HunYuanDenseV1ForCausalLM",), ("hunyuan_v1_dense",), read)
