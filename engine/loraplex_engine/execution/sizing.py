"""What a model takes of its device's memory, by the formulas of docs/sizing.md.

Before it is loaded they tell whether it fits, and afterwards, for people, how many requests and adapters do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from loraplex_adapters.runtime.targets import LoraTarget, TargetKind
from loraplex_engine.checkpoint.config_source import read_config
from loraplex_engine.checkpoint.model_config import ModelConfig, UnknownArchitectureError
from loraplex_engine.checkpoint.shard import WHOLE, Shard
from loraplex_engine.checkpoint.weights import Checkpoint, aliased_name
from loraplex_engine.execution.kv_cache import stored_dtype
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.sizes import Needs
from loraplex_engine.models import read_model_config
from loraplex_engine.models.layout import (
    CLASSIFIER,
    CLASSIFIER_BIAS,
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    HEAD_SITE,
    final_norm,
    held_heads,
    held_parts,
    layer_linears,
    lora_targets,
    norm_tensors,
    tensor_shapes,
)
from loraplex_engine.models.model import ModelFacts
from loraplex_engine.models.precision import compute_dtype
from loraplex_engine.quantization import base_names, read_spec
from loraplex_kernels.ops import HeadShape

SCALE_BYTES = 4  # of what is rounded: a float32
# Bytes of a weight that is quantised while it is loaded, its share of a scale included.
ROUNDED_BYTES = {"nf4": 0.5 + SCALE_BYTES / 64, "int4": 0.5 + 2 * SCALE_BYTES / 64, "int8": 1.0}
USUAL_RANK = 16  # of the adapters that are counted for people


def needs_of(config: EngineConfig, path: Path) -> Needs:
    """What the model in `path` takes at least, by its files alone: nothing is loaded. Of several ranks, the largest.

    Of a model that transformers' class computes, the cache and the steps are known only once it is loaded.
    """
    raw = read_config(path)
    spec = read_spec(path, raw)
    model = None
    if config.implementation != "transformers":
        with suppress(UnknownArchitectureError):
            model = read_model_config(path, config.rope_scaling)
    adapters = config.adapter_device_bytes
    if model is None:
        with Checkpoint(path, base_names=base_names(path, raw), names=str) as checkpoint:
            return Needs(checkpoint.nbytes, config.kv_cache_bytes or 0, 0, adapters, config.host_cache_bytes)
    names = partial(aliased_name, model.aliases)
    with Checkpoint(path, model.unused_tensors, base_names=base_names(path, raw), names=names) as checkpoint:
        stored = checkpoint.nbytes
        dtype = compute_dtype(config.dtype, model.dtype, checkpoint.dtype(EMBEDDING))
    count = config.pipeline_parallel
    stages = [Shard(0, config.tensor_parallel, stage, count) for stage in range(count)]
    shard = stages[0]
    weights = (
        weight_bytes(model, dtype, config, each) if spec is None else _stored_bytes(model, dtype, stored, each)
        for each in stages
    )
    length = config.max_model_len or model.max_position_embeddings
    blocks, heads = -(-length // config.block_size), held_heads(model, shard)
    of_token = cache_bytes_per_token(shard.most_layers(model.num_layers), heads, config, dtype)
    of_sequence = blocks * config.block_size * of_token
    targets = lora_targets(model, shard)
    return Needs(
        max(weights),
        config.kv_cache_bytes or of_sequence,
        step_bytes(model, targets, config, dtype),
        adapters,
        config.host_cache_bytes,
    )


def _stored_bytes(model: ModelConfig, dtype: torch.dtype, stored: int, shard: Shard) -> int:
    """Of a quantised checkpoint about as many as it has, of which each rank has a part; but the whole embedding.

    The head of the first of several stages is taken to be as large as the embedding.
    """
    if shard == WHOLE:
        return stored
    embedding = min(stored, model.vocab_size * model.hidden_size * dtype.itemsize)
    head = 0 if model.tie_word_embeddings or not model.generates else min(stored - embedding, embedding)
    of_layers = (stored - embedding - head) * len(shard.layers(model.num_layers)) // model.num_layers
    ends = embedding if shard.is_first else 0
    return ends + -(-(of_layers + (head if shard.is_first else 0)) // shard.world)


def weight_bytes(model: ModelConfig, dtype: torch.dtype, config: EngineConfig, shard: Shard) -> int:
    """Of an unquantised checkpoint, as it is loaded: matrices and biases in `dtype` or rounded, all else in float32.

    A head that is tied to the embedding counts like any other: kernels lay it out once more.
    """
    shapes = _held_shapes(model, shard)
    rest = sum(map(math.prod, shapes.values()))
    total = 0.0
    if shard.is_first:
        table, head_bias = math.prod(shapes[EMBEDDING]), math.prod(shapes.get(HEAD_BIAS, (0,)))
        total += (table + head_bias) * dtype.itemsize
        rest -= table + head_bias
        if model.generates:
            head = shard.widest(model.vocab_size) * model.hidden_size
            total += head * ROUNDED_BYTES.get(config.head_quantization or "", dtype.itemsize)
            rest -= table
    for layer in shard.layers(model.num_layers):
        for linear in layer_linears(model, layer):
            rows = sum(size for _, size in linear.parts)
            held = [(rows.stop - rows.start, columns) for rows, columns in held_parts(linear, shard)]
            held_rows, columns = sum(count for count, _ in held), held[0][1]
            own = torch.float32 if linear.in_float32 else dtype
            rounding = None if linear.kept_dense else config.quantization
            total += held_rows * (columns.stop - columns.start) * ROUNDED_BYTES.get(rounding or "", own.itemsize)
            total += held_rows * own.itemsize if linear.bias else 0
            rest -= rows * (linear.in_features + linear.bias)
    positions = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    return int(total) + rest * torch.float32.itemsize + positions * rotary_bytes_per_position(model, shard)


def _held_shapes(model: ModelConfig, shard: Shard) -> dict[str, tuple[int, ...]]:
    """The tensors of which the rank has a part, whole; on the first stage the head, be it the embedding."""
    shapes = tensor_shapes(model)
    ends = {name: shapes[name] for name in (EMBEDDING, HEAD_BIAS, CLASSIFIER, CLASSIFIER_BIAS) if name in shapes}
    ends |= {HEAD: shapes[EMBEDDING]} if model.generates else {}
    norm = {name: shapes[name] for name in norm_tensors(model, final_norm(model))}
    own = tuple(f"model.layers.{layer}." for layer in shard.layers(model.num_layers))
    of_layers = {name: shape for name, shape in shapes.items() if name.startswith(own)}
    return (ends if shard.is_first else {}) | of_layers | (norm if shard.is_last else {})


def rotary_bytes_per_position(model: ModelConfig, shard: Shard = WHOLE) -> int:
    """Of the tables by which queries and keys are turned: a cosine and a sine for each pair, in float32."""
    ropes = {model.layers[layer].rope for layer in shard.layers(model.num_layers)}
    turned = (model.head_dim if rope is None else rope.dims(model.head_dim) for rope in ropes)
    return sum(dims // 2 * 2 * torch.float32.itemsize for dims in turned)


def cache_bytes_per_token(num_layers: int, heads: HeadShape, config: EngineConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers; where they are rounded, with a scale for each of their heads."""
    stored = stored_dtype(config.kv_cache_dtype, dtype)
    scale = 0 if config.kv_cache_dtype == "auto" else SCALE_BYTES
    return num_layers * 2 * heads.num_kv_heads * (heads.head_dim * stored.itemsize + scale)


def adapter_bytes(targets: Mapping[str, LoraTarget], rank: int, dtype: torch.dtype) -> int:
    """An adapter of this rank on every linear of the layers: its A [rank, C] and its B [N, rank] of each projection."""
    return sum(rank * sum(shape) * (each or dtype).itemsize for *shape, each in _projections(targets))


def step_bytes(model: ModelFacts, targets: Mapping[str, LoraTarget], config: EngineConfig, dtype: torch.dtype) -> int:
    """About what the largest step takes: its tokens' rows, and the logits of what it draws, before and after sorting.

    A layer has the residual, what is normed, and the inputs and outputs of its widest linear at once.
    """
    widest = max((max(in_features, out_features) for in_features, out_features, _ in _projections(targets)), default=0)
    rows = config.max_num_batched_tokens * (2 * model.hidden_size + 3 * widest) * dtype.itemsize
    return rows + 2 * config.most_drawn * model.vocab_size * torch.float32.itemsize


def _projections(targets: Mapping[str, LoraTarget]) -> Iterator[tuple[int, int, torch.dtype | None]]:
    """C, N and own dtype of each projection that a rank has. Those that a linear is called as a whole count once."""
    by_site: dict[str, dict[tuple[int, int], LoraTarget]] = defaultdict(dict)
    for target in targets.values():
        linear = target.kind in (TargetKind.LINEAR, TargetKind.EXPERT) and target.site != HEAD_SITE
        if linear and not target.is_elsewhere:
            by_site[target.site][target.columns.start, target.columns.stop] = target
    for found in by_site.values():
        for (start, stop), target in found.items():
            within = any(start <= other[0] and other[1] <= stop for other in found if other != (start, stop))
            if not within:
                yield target.in_features, target.out_features, target.dtype
