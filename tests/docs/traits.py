"""What a decoder has beside Llama's layers, in the words of docs/models.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loraplex_engine.checkpoint.model_config import LayerAttention, LongRopeScaling, ModelConfig, Rope
from loraplex_engine.layers.feed_forward import ClampedSwish, GatedLayout, PlainLayout
from loraplex_engine.layers.mixture import MixtureLayout


def _mixtures(config: ModelConfig) -> list[MixtureLayout]:
    return [layout for layout in config.feed_forwards if isinstance(layout, MixtureLayout)]


def _ropes(config: ModelConfig) -> list[Rope]:
    return [layer.rope for layer in config.layers if layer.rope is not None]


def _some(which: Callable[[LayerAttention], object]) -> Callable[[ModelConfig], bool]:
    """Whether some layers are so."""
    return lambda config: any(which(layer) for layer in config.layers)


def _experts(which: Callable[[MixtureLayout], object]) -> Callable[[ModelConfig], bool]:
    """Whether there are experts, which are so."""
    return lambda config: any(which(mixture) for mixture in _mixtures(config))


def _has_gelu(config: ModelConfig) -> bool:
    return any(isinstance(each, GatedLayout) and each.activation == "gelu_tanh" for each in config.feed_forwards)


def _has_fused_tensors(config: ModelConfig) -> bool:
    dense = [layout for layout in config.feed_forwards if isinstance(layout, GatedLayout)]
    return config.fused_tensors or any(layout.stored_fused for layout in dense)


TRAITS: dict[str, Callable[[ModelConfig], object]] = {
    "sliding windows": lambda config: all(layer.window for layer in config.layers),
    "sliding windows in some layers": lambda c: 0 < sum(layer.window is not None for layer in c.layers) < c.num_layers,
    "attention within chunks": _some(lambda layer: layer.chunk),
    "latent attention": lambda config: config.latent,
    "sinks": lambda config: config.attention_sinks,
    "layers without rotation": _some(lambda layer: layer.rope is None),
    "a rotation for each kind of layer": lambda config: len(set(_ropes(config))) > 1,
    "a part of each head turned": lambda c: c.latent is None and any(rope.part < 1 for rope in _ropes(c)),
    "neighbours turned together": lambda config: any(rope.interleaved for rope in _ropes(config)),
    "LongRoPE": lambda config: any(isinstance(rope.scaling, LongRopeScaling) for rope in _ropes(config)),
    "queries that grow with their position": _some(lambda layer: layer.growth),
    "norms on query and key heads": lambda c: c.head_norm or c.unit_heads or (c.qk_norm and not c.qk_norm_rotated),
    "norms on query and key heads behind the rotation": lambda config: config.qk_norm_rotated,
    "norms over whole queries and keys": lambda config: config.projection_norm,
    "norms around": lambda config: config.norms.before_attention and config.norms.after_attention,
    "norms behind": lambda config: not config.norms.before_attention,
    "layer norms": lambda config: config.layer_norm,
    "parallel halves": lambda config: config.parallel,
    "biases": lambda config: config.qkv_bias and config.o_bias,
    "biases on query, key and value": lambda config: config.qkv_bias and not config.o_bias,
    "a bias on the head": lambda config: config.head_bias,
    "fused tensors": _has_fused_tensors,
    "GELU": _has_gelu,
    "a feed-forward without a gate": lambda c: any(isinstance(each, PlainLayout) for each in c.feed_forwards),
    "a scaled embedding": lambda config: config.embedding_scale and not config.residual_scale,
    "multipliers": lambda config: config.residual_scale,
    "scaled logits": lambda config: config.logits_scale and not config.residual_scale,
    "soft caps": lambda config: config.attention_soft_cap or config.logits_soft_cap,
    "experts": _experts(lambda mixture: mixture),
    "in groups": _experts(lambda mixture: mixture.routing.groups > 1),
    "chosen with a correction": _experts(lambda mixture: mixture.correction),
    "each weighed against those near it": _experts(lambda mixture: mixture.routing.score == "softmax_of_near"),
    "whose inputs are scaled": _experts(lambda mixture: mixture.scales_inputs),
    "whose activation is clamped": _experts(lambda mixture: isinstance(mixture.expert.activation, ClampedSwish)),
    "with biases of their own": _experts(lambda mixture: mixture.expert.bias),
    "a shared one": _experts(lambda mixture: mixture.shared),
    "with a gate": _experts(lambda mixture: mixture.shared_gate),
    "dense layers": lambda config: 0 < len(_mixtures(config)) < config.num_layers,
}


def described(configs: Sequence[ModelConfig]) -> str:
    """What all of these models have, and what some of them do."""
    return ", ".join(_described(configs))


def _described(configs: Sequence[ModelConfig]) -> Iterable[str]:
    for trait, has in TRAITS.items():
        found = [bool(has(config)) for config in configs]
        if any(found):
            yield trait if all(found) else f"perhaps {trait}"
