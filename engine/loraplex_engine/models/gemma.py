"""Gemma 1: Llama's layers, with norm weights stored less 1, scaled embeddings and another activation."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if fields.text("hidden_act") == "gelu":  # the first files say so, and mean the other one, as transformers knows
        fields = fields.changed_by(ConfigFields({"hidden_act": "gelu_pytorch_tanh"}, fields.where))
    if fields.flag("use_bidirectional_attention"):
        raise fields.error("use_bidirectional_attention", True, "false: only causal models generate text")
    layers = (LayerAttention(read_rope(fields)),) * fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias")
    config = decoder_config(architecture, fields, layers)
    return replace(
        config,
        qkv_bias=bias,
        o_bias=bias,
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        fits_float16=False,
    )


FAMILY = Family(("GemmaForCausalLM",), ("gemma",), read)
