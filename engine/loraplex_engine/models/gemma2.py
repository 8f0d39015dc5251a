"""Gemma 2: norms before and after each half of a layer, soft-capped scores and logits, every other layer local."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import NORMS_AROUND, LayerAttention, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope

DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def gemma_config(architecture: str, fields: ConfigFields, layers: tuple[LayerAttention, ...]) -> ModelConfig:
    """The configuration that Gemma 2 and 3 have in common."""
    if fields.flag("use_bidirectional_attention"):
        raise fields.error("use_bidirectional_attention", True, "false: only causal models generate text")
    bias = fields.flag("attention_bias")
    config = decoder_config(architecture, fields, layers)
    return replace(
        config,
        qkv_bias=bias,
        o_bias=bias,
        norms=NORMS_AROUND,
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        logits_soft_cap=fields.optional_number("final_logit_softcapping"),
        fits_float16=False,
    )


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    window = fields.optional_integer("sliding_window")
    pattern = tuple(layer % 2 == 0 for layer in range(fields.integer("num_hidden_layers")))
    rope = read_rope(fields)
    layers = tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))
    return replace(
        gemma_config(architecture, fields, layers), attention_soft_cap=fields.optional_number("attn_logit_softcapping")
    )


FAMILY = Family(("Gemma2ForCausalLM",), ("gemma2",), read)
