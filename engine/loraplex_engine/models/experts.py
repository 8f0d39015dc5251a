"""Read what families with experts spell alike."""

from __future__ import annotations

from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import FeedForwardLayout, ModelConfig

MAX_EXPERTS = 1 << 16  # of all layers: the largest models have half as many


def number_of_experts(fields: ConfigFields, *names: str) -> int:
    """The number of experts, under the first of these names that the file has. Raises ModelError for too many."""
    name = next((name for name in names if fields.has(name)), names[0])
    count = fields.integer(name)
    num_layers = fields.integer("num_hidden_layers")
    if count * num_layers > MAX_EXPERTS:
        raise fields.error(name, count, f"at most {MAX_EXPERTS} in all of the {num_layers} layers together")
    return count


def experts_per_token(fields: ConfigFields, num_experts: int, name: str = "num_experts_per_tok") -> int:
    count = fields.integer(name)
    if count > num_experts:
        raise fields.error(name, count, f"at most the number of experts ({num_experts})")
    return count


def with_experts(config: ModelConfig, mixture: FeedForwardLayout, sparse: tuple[bool, ...]) -> ModelConfig:
    """The config with experts in the layers for which `sparse` is true."""
    layouts = zip(config.feed_forwards, sparse, strict=True)
    return replace(config, feed_forwards=tuple(mixture if has else dense for dense, has in layouts))


def sparse_layers(fields: ConfigFields) -> tuple[bool, ...]:
    """Which layers of a Qwen have experts."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers") if fields.has("mlp_only_layers") else ()
    layers = range(fields.integer("num_hidden_layers"))
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)
