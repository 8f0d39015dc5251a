"""Llama 4: layers that see their own chunk, layers without rotation whose queries grow, experts of scaled inputs."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import LayerAttention, ModelConfig, QueryGrowth
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.models.experts import experts_per_token, number_of_experts, with_experts
from loraplex_engine.models.reading import Family, decoder_config, gate_activation, layers_of_kind
from loraplex_engine.models.rope_reading import read_rope
from loraplex_engine.models.smollm3 import rotated_layers
from loraplex_kernels.ops import Routing

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16_384,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "eos_token_id": 2,
}


def read(architecture: str, fields: ConfigFields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    activation, bias = gate_activation(fields), fields.flag("attention_bias")
    dense = GatedLayout(fields.integer("intermediate_size_mlp"), activation, module="feed_forward")
    config = replace(
        decoder_config(architecture, fields, _layers(fields), feed_forward=dense),
        qkv_bias=bias,
        o_bias=bias,
        unit_heads=fields.flag("use_qk_norm"),
    )
    return with_experts(config, _mixture(fields), _sparse_layers(fields))


def _layers(fields: ConfigFields) -> tuple[LayerAttention, ...]:
    """Those that turn see their own chunk, unless the file says otherwise. The queries of the others grow."""
    rotated, rope = rotated_layers(fields), replace(read_rope(fields, 500_000.0), interleaved=True)
    chunk = fields.optional_integer("attention_chunk_size")
    growth = None
    if _grows(fields):
        growth = QueryGrowth(fields.number("attn_scale"), fields.integer("floor_scale"), ahead=1, rounded=False)
    chunked = layers_of_kind(fields, "chunked_attention", rotated)
    return tuple(
        LayerAttention(rope if turns else None, chunk=chunk if sees else None, growth=None if turns else growth)
        for turns, sees in zip(rotated, chunked, strict=True)
    )


def _grows(fields: ConfigFields) -> bool:
    """Whether queries grow. The first files have a number there, of which 0 alone says that they do not."""
    name = "attn_temperature_tuning"
    stated = fields.raw()[name]
    return fields.integer(name, minimum=0) > 0 if type(stated) is int else fields.flag(name)


def _sparse_layers(fields: ConfigFields) -> tuple[bool, ...]:
    layers, step = range(fields.integer("num_hidden_layers")), fields.integer("interleave_moe_layer_step")
    stated = fields.integers("moe_layers") if fields.has("moe_layers") else range(step - 1, len(layers), step)
    return tuple(layer in stated for layer in layers)


def _mixture(fields: ConfigFields) -> MixtureLayout:
    num_experts, size = (
        number_of_experts(fields, "num_local_experts", "num_experts"),
        fields.integer("intermediate_size"),
    )
    activation = gate_activation(fields)
    return MixtureLayout(
        num_experts,
        GatedLayout(size, activation, module="feed_forward.experts"),
        Routing(experts_per_token(fields, num_experts), "late_sigmoid", normalised=False),
        router="feed_forward.router",
        scales_inputs=True,
        shared=GatedLayout(size, activation, module="feed_forward.shared_expert", site="shared."),
        transposed=True,
        unknown=True,
    )


FAMILY = Family(("Llama4ForCausalLM",), ("llama4_text",), read)
