"""Qwen 3: Qwen 2's layers with norms on query and key heads in place of the biases."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.models.qwen2 import DEFAULTS, qwen_layers
from loraplex_engine.models.reading import Family, decoder_config


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults({**DEFAULTS, "head_dim": 128})
    bias = fields.flag("attention_bias")
    return replace(decoder_config(architecture, fields, qwen_layers(fields)), qkv_bias=bias, o_bias=bias, qk_norm=True)


FAMILY = Family(("Qwen3ForCausalLM",), ("qwen3", "qwen3_vl_text"), read)
