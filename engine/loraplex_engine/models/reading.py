"""Read a Hugging Face config.json, in the spellings of several years, without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import (
    FeedForwardLayout,
    LayerAttention,
    LongRopeScaling,
    ModelConfig,
)
from loraplex_engine.layers.feed_forward import Activation, GatedLayout, PlainActivation
from loraplex_engine.models.rope_reading import max_positions

# transformers' names of the two activations that the kernels have
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
PLAIN_ACTIVATIONS: Mapping[str, PlainActivation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
MAX_LAYERS = 1024  # eight times those of the deepest models: the file is wrong
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Family:
    """Models that share one shape: how to recognise them, and how to read what is particular to them."""

    architectures: tuple[str, ...]  # as in config.json
    model_types: tuple[str, ...]  # for files that do not state an architecture
    read: Callable[[str, ConfigFields], ModelConfig]  # of the architecture and the fields


def text_fields(raw: Mapping[str, object], where: str) -> ConfigFields:
    """The fields of the language model, which a multimodal config keeps under `text_config`.

    Raises ModelError for more layers than a model has: all are listed, before their tensors are looked for.
    """
    text = raw.get("text_config")
    # The outer ones are the whole model's; inside there may only be the defaults of its class.
    outer = {name: raw[name] for name in ("tie_word_embeddings", "eos_token_id") if raw.get(name) is not None}
    merged = {**raw, **text, **outer} if isinstance(text, dict) else dict(raw)
    fields, layers = ConfigFields(merged, where), "num_hidden_layers"
    if fields.has(layers) and fields.integer(layers) > MAX_LAYERS:
        raise fields.error(layers, fields.integer(layers), f"at most {MAX_LAYERS}")
    return fields


def decoder_config(
    architecture: str,
    fields: ConfigFields,
    layers: tuple[LayerAttention, ...],
    mlp_bias: bool = False,
    feed_forward: FeedForwardLayout | None = None,
    norm_eps: float | None = None,
) -> ModelConfig:
    """Read the fields that all families spell alike. A family replaces the fields in which it differs.

    feed_forward: of every layer. None: a gated one, as the fields describe it.
    norm_eps: None: it is in the field that most families have.

    Raises ModelError for shapes that no decoder can have.
    """
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("head_dim", None, f"given where {num_heads} heads do not divide hidden_size {hidden_size}")
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "even, as rotary embeddings turn its two halves")
    _check_ropes(fields, layers, head_dim)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    if feed_forward is None:
        feed_forward = GatedLayout(fields.integer("intermediate_size"), gate_activation(fields), mlp_bias)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions((layer.rope for layer in layers if layer.rope is not None), fields),
        norm_eps=fields.number("rms_norm_eps") if norm_eps is None else norm_eps,
        layers=layers,
        feed_forwards=(feed_forward,) * len(layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=_dtype(fields),
        attention_scale=head_dim**-0.5,
    )


def all_but_every(count: int, num_layers: int) -> tuple[bool, ...]:
    """A pattern over the layers: True but for the last of every `count`."""
    return tuple((layer + 1) % count != 0 for layer in range(num_layers))


def sliding_layers(fields: ConfigFields, pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers have a sliding window: those that `layer_types` names, or `pattern` where the file has no such."""
    return layers_of_kind(fields, "sliding_attention", pattern)


def layers_of_kind(fields: ConfigFields, which: str, pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers `layer_types` calls so, where the others are of full attention; `pattern` without such a field."""
    kinds = fields.texts("layer_types")
    if not kinds:
        return pattern
    unknown = sorted(set(kinds) - {"full_attention", which})
    if unknown:
        raise fields.error("layer_types", unknown, f"made of full_attention and {which}")
    if len(kinds) != len(pattern):
        raise fields.error("layer_types", list(kinds), f"as long as the model has layers ({len(pattern)})")
    return tuple(kind == which for kind in kinds)


def _check_ropes(fields: ConfigFields, layers: tuple[LayerAttention, ...], head_dim: int) -> None:
    for rope in {layer.rope for layer in layers if layer.rope is not None}:
        if rope.dims(head_dim) % 2 or not rope.dims(head_dim):
            turned = f"such that an even number of the {head_dim} dimensions of a head turns"
            raise fields.error("partial_rotary_factor", rope.part, turned)
        if isinstance(rope.scaling, LongRopeScaling):
            for name, factors in (("short_factor", rope.scaling.short), ("long_factor", rope.scaling.long)):
                if len(factors) != rope.dims(head_dim) // 2:
                    raise fields.error(name, len(factors), f"{rope.dims(head_dim) // 2} numbers, half of what turns")


def gate_activation(fields: ConfigFields) -> Activation:
    """The activation of a gated feed-forward."""
    name = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"  # Gemma's spelling goes first
    value = fields.text(name)
    if value not in ACTIVATIONS:
        raise fields.error(name, value, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def plain_activation(fields: ConfigFields) -> PlainActivation:
    """The activation of a feed-forward without a gate."""
    value = fields.text("hidden_act")
    if value not in PLAIN_ACTIVATIONS:
        raise fields.error("hidden_act", value, f"one of {', '.join(PLAIN_ACTIVATIONS)}")
    return PLAIN_ACTIVATIONS[value]


def _dtype(fields: ConfigFields) -> str | None:
    name = "dtype" if fields.has("dtype") else "torch_dtype"  # renamed in transformers 5
    if not fields.has(name):
        return None
    value = fields.text(name).removeprefix("torch.")
    if value not in DTYPES:
        raise fields.error(name, value, f"one of {', '.join(DTYPES)}")
    return value
