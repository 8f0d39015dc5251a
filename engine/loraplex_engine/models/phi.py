"""Phi 1, 1.5 and 2: parallel halves, layer norms, biases everywhere, the head's too; a part of each head turned."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, LayerNorms, ModelConfig
from loraplex_engine.layers.feed_forward import PlainLayout
from loraplex_engine.models.reading import Family, decoder_config, plain_activation
from loraplex_engine.models.rope_reading import read_partial_rope

DEFAULTS = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "eos_token_id": 2}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if fields.flag("qk_layernorm"):
        raise fields.error("qk_layernorm", True, "false: no published model has these norms")
    layers = (LayerAttention(read_partial_rope(fields, 0.5)),) * fields.integer("num_hidden_layers")
    size, modules = fields.integer("intermediate_size"), ("mlp.fc1", "mlp.fc2")
    plain = PlainLayout(size, plain_activation(fields), bias=True, modules=modules)
    return replace(
        decoder_config(architecture, fields, layers, feed_forward=plain, norm_eps=fields.number("layer_norm_eps")),
        qkv_bias=True,
        o_bias=True,
        o_module="self_attn.dense",
        head_bias=True,
        layer_norm=True,
        norm_bias=True,
        norms=LayerNorms("input_layernorm"),
        final_norm="final_layernorm",
        parallel=True,
    )


FAMILY = Family(("PhiForCausalLM",), ("phi",), read)
