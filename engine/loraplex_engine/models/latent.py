"""Read what families with latent attention spell alike."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LatentAttention, LayerAttention, ModelConfig
from loraplex_engine.models.reading import decoder_config
from loraplex_engine.models.rope_reading import part_of_head, read_rope, yarn_sharpness


def latent_config(architecture: str, fields: ConfigFields, interleaved: bool) -> ModelConfig:
    """The config of a decoder with dense layers whose heads are made from latents.

    interleaved: what is turned together are neighbours.
    """
    still, turned = (_even(fields, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    head_dim, values = still + turned, fields.integer("v_head_dim")
    if values > head_dim:
        raise fields.error("v_head_dim", values, f"at most qk_nope_head_dim + qk_rope_head_dim ({head_dim})")
    rope = replace(read_rope(fields), part=part_of_head(turned, head_dim), interleaved=interleaved)
    num_heads, bias = fields.integer("num_attention_heads"), fields.flag("attention_bias")
    heads = ConfigFields({"head_dim": head_dim, "num_key_value_heads": num_heads}, fields.where)
    layers = (LayerAttention(rope),) * fields.integer("num_hidden_layers")
    latent = LatentAttention(
        fields.optional_integer("q_lora_rank"), fields.integer("kv_lora_rank"), still, turned, values
    )
    return replace(
        decoder_config(architecture, fields.changed_by(heads), layers),
        latent=latent,
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=head_dim**-0.5 * yarn_sharpness(fields),
    )


def _even(fields: ConfigFields, name: str) -> int:
    value = fields.integer(name)
    if value % 2:
        raise fields.error(name, value, "even")
    return value
