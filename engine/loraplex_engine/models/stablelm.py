"""StableLM: layer norms, a part of each head turned; the larger ones with parallel halves and norms on heads."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import NORMS_BEFORE, LayerAttention, LayerNorms, ModelConfig
from loraplex_engine.models.reading import Family, decoder_config
from loraplex_engine.models.rope_reading import read_partial_rope

DEFAULTS = {"hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 0}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    layers = (LayerAttention(read_partial_rope(fields, 0.25)),) * fields.integer("num_hidden_layers")
    parallel = fields.flag("use_parallel_residual")
    return replace(
        decoder_config(architecture, fields, layers, norm_eps=fields.number("layer_norm_eps")),
        qkv_bias=fields.flag("use_qkv_bias"),
        layer_norm=True,
        norm_bias=True,
        norms=LayerNorms("input_layernorm") if parallel else NORMS_BEFORE,
        parallel=parallel,
        head_norm="apart" if fields.flag("qk_layernorm") else None,
        qk_norm_modules=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    )


FAMILY = Family(("StableLmForCausalLM",), ("stablelm",), read)
