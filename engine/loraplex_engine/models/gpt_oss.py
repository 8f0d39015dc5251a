"""gpt-oss: every other layer with a window, sinks, and experts with biases whose activation is clamped."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig
from loraplex_engine.layers.feed_forward import ClampedSwish, GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts
from loraplex_engine.models.reading import Family, decoder_config, sliding_layers
from loraplex_engine.models.rope_reading import read_rope, with_default_rope
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = with_default_rope(fields.with_defaults(DEFAULTS), ROPE)
    window, rope = fields.optional_integer("sliding_window"), read_rope(fields, 150_000.0)
    pattern = tuple(layer % 2 == 0 for layer in range(fields.integer("num_hidden_layers")))
    layers = tuple(LayerAttention(rope, window if slides else None) for slides in sliding_layers(fields, pattern))
    bias = fields.flag("attention_bias", True)
    return replace(
        decoder_config(architecture, fields, layers, feed_forward=_mixture(fields)),
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
    )


def _mixture(fields: ConfigFields) -> MixtureLayout:
    num_experts = number_of_experts(fields, "num_local_experts", "num_experts")
    activation = ClampedSwish(fields.number("swiglu_alpha"), fields.number("swiglu_limit"))
    expert = GatedLayout(fields.integer("intermediate_size"), activation, bias=True, module="mlp.experts", in_turn=True)
    routing = Routing(experts_per_token(fields, num_experts))
    return MixtureLayout(
        num_experts, expert, routing, router="mlp.router", router_bias=True, stacked=True, transposed=True
    )


FAMILY = Family(("GptOssForCausalLM",), ("gpt_oss",), read)
