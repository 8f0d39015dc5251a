"""MiniCPM 3: heads made from latents, and multipliers."""

from __future__ import annotations

import math
from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.models.latent import latent_config
from loraplex_engine.models.reading import Family

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "kv_lora_rank": 256,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "eos_token_id": 2,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    hidden_size, num_layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    if not fields.has("v_head_dim"):
        values = {"v_head_dim": hidden_size // fields.integer("num_attention_heads")}
        fields = fields.changed_by(ConfigFields(values, fields.where))
    return replace(
        latent_config(architecture, fields, interleaved=False),
        embedding_scale=fields.number("scale_emb"),
        residual_scale=fields.number("scale_depth", math.sqrt(num_layers)) / math.sqrt(num_layers),
        logits_scale=fields.integer("dim_model_base", hidden_size) / hidden_size,
    )


FAMILY = Family(("MiniCPM3ForCausalLM",), ("minicpm3",), read)
