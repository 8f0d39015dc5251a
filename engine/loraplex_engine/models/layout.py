"""Which linears and norms each layer of a decoder has, and what their parts are called in a checkpoint.

Written down once: the expected tensors, the loading, the LoRA targets and each rank's part of them follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from loraplex_adapters.runtime.classifier import CLASSIFIER_MODULES, CLASSIFIER_SITE
from loraplex_adapters.runtime.layer import EMBEDDING_SITE
from loraplex_adapters.runtime.targets import LoraTarget, Share, TargetKind
from loraplex_engine.checkpoint.model_config import FusedLinear, LatentAttention, ModelConfig
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.link.pooling import ClassifierFacts
from loraplex_engine.quantization import LinearShape
from loraplex_kernels.ops import HeadShape

EMBEDDING = "model.embed_tokens.weight"
HEAD_MODULE = "lm_head"
HEAD, HEAD_BIAS = f"{HEAD_MODULE}.weight", f"{HEAD_MODULE}.bias"
HEAD_SITE, FINAL_NORM_SITE = HEAD_MODULE, "norm"
CLASSIFIER, CLASSIFIER_BIAS = "score.weight", "score.bias"
OUTPUT = "o"  # the linear behind the attention

# Projections of which, in the last layer, keys and values do not depend. Of others, that is not said.
BEHIND_CACHE = ("q_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def layer_linears(config: ModelConfig, layer: int) -> tuple[FusedLinear, ...]:
    """The linears of one layer: those of its attention, and those of its feed-forward."""
    return (*attention_linears(config), *config.feed_forwards[layer].linears(config.hidden_size))


def attention_linears(config: ModelConfig) -> tuple[FusedLinear, ...]:
    """Those that make queries, keys and values, and at last that of the output."""
    inputs = (_qkv(config),) if config.latent is None else _latent_linears(config, config.latent)
    values, outputs = config.num_heads * config.value_dim, ((config.o_module, config.hidden_size),)
    return (*inputs, FusedLinear(OUTPUT, config.o_module, values, outputs, config.o_bias, "inputs", config.value_dim))


def _qkv(config: ModelConfig) -> FusedLinear:
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return FusedLinear(
        "qkv",
        "self_attn.qkv_proj",
        config.hidden_size,
        (("self_attn.q_proj", query), ("self_attn.k_proj", key_value), ("self_attn.v_proj", key_value)),
        config.qkv_bias,
        "outputs",
        config.head_dim,
        config.fused_tensors,
    )


def _latent_linears(config: ModelConfig, latent: LatentAttention) -> tuple[FusedLinear, ...]:
    hidden, rank, made = config.hidden_size, latent.query_rank, latent.still + latent.values

    def to_latent(site: str, module: str, size: int) -> FusedLinear:
        return FusedLinear(site, module, hidden, ((module, size),), config.qkv_bias, "nothing")

    def to_heads(site: str, module: str, size: int, unit: int) -> FusedLinear:
        return FusedLinear(site, module, size, ((module, config.num_heads * unit),), False, "outputs", unit)

    queries: tuple[FusedLinear, ...] = (to_heads("q", "self_attn.q_proj", hidden, config.head_dim),)
    if rank is not None:
        queries = (
            to_latent("q_a", "self_attn.q_a_proj", rank),
            to_heads("q_b", "self_attn.q_b_proj", rank, config.head_dim),
        )
    return (
        *queries,
        to_latent("kv_a", "self_attn.kv_a_proj_with_mqa", latent.rank + latent.turned),
        to_heads("kv_b", "self_attn.kv_b_proj", latent.rank, made),
    )


def latent_norms(config: ModelConfig) -> dict[str, int]:
    """The paths in a layer of the norms of its latents, and their sizes: of keys and values, then of queries."""
    if config.latent is None:
        return {}
    norms = {"self_attn.kv_a_layernorm.weight": config.latent.rank}
    if config.latent.query_rank is not None:
        norms["self_attn.q_a_layernorm.weight"] = config.latent.query_rank
    return norms


def held_parts(linear: FusedLinear, shard: Shard) -> tuple[tuple[slice, slice], ...]:
    """The rows and the columns of each projection's weight [N, C] that a rank holds.

    Embedding and norms are whole on every rank; of the head's rows each has a stretch.
    """
    columns = slice(0, linear.in_features)
    if linear.split == "inputs":
        columns = shard.part(linear.in_features, linear.unit)
    # Ranks may have the same heads of keys and values, of which there are fewer.
    return tuple(
        (shard.part(size, linear.unit, may_share=True) if linear.split == "outputs" else slice(0, size), columns)
        for _, size in linear.parts
    )


def stored_parts(linear: FusedLinear, shard: Shard) -> tuple[tuple[str, slice, slice], ...]:
    """What a rank reads of a linear, in order: the module inside a layer that has it in the checkpoint, and the rows
    and the columns there."""
    held = held_parts(linear, shard)
    if not is_stored_fused(linear):
        return tuple((module, *part) for (module, _), part in zip(linear.parts, held, strict=True))
    found: list[tuple[str, slice, slice]] = []
    start = 0
    for (_, size), (rows, columns) in zip(linear.parts, held, strict=True):
        first, end = start + rows.start, start + rows.stop
        if found and found[-1][1].stop == first:
            first = found.pop()[1].start
        found.append((linear.module, slice(first, end), columns))
        start += size
    return tuple(found)


def is_stored_fused(linear: FusedLinear) -> bool:
    """Whether the checkpoint has the projections of a linear in one tensor."""
    return linear.stored_fused or (linear.stack is not None and linear.stack.stored)


def stored_shapes(linear: FusedLinear) -> tuple[tuple[str, int], ...]:
    """The modules inside a layer that have a linear in the checkpoint, and the output features of each."""
    if not is_stored_fused(linear):
        return linear.parts
    return ((linear.module, sum(size for _, size in linear.parts)),)


def adds_bias(linear: FusedLinear, shard: Shard) -> bool:
    """Whether a rank adds the bias: where the ranks' outputs are summed up, one of them does."""
    return linear.split != "inputs" or shard.rank == 0


def held_heads(config: ModelConfig, shard: Shard) -> HeadShape:
    """The heads of a rank, whose rows `held_parts` gives it."""
    query = shard.part(config.num_heads, 1)
    key_value = shard.part(config.num_kv_heads, 1, may_share=True)
    return HeadShape(query.stop - query.start, key_value.stop - key_value.start, config.head_dim)


SINKS = "self_attn.sinks"


def residual_norms(config: ModelConfig) -> tuple[str, ...]:
    """The paths in a layer of the norms that adapters may replace."""
    norms = config.norms
    places = norms.before_attention, norms.before_mlp, norms.after_attention, norms.after_mlp
    return tuple(place for place in places if place is not None)


def query_key_norms(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The tensors inside a layer of the norm of its queries and of that of its keys, and their shapes; (): none."""
    if not (config.qk_norm or config.projection_norm or config.head_norm):
        return ()
    dim, norms = config.head_dim, zip(config.qk_norm_modules, (config.num_heads, config.num_kv_heads), strict=True)
    if config.head_norm == "apart":
        return tuple({f"{path}.norms.{head}.weight": (dim,) for head in range(heads)} for path, heads in norms)
    if config.head_norm == "together":
        return tuple({f"{path}.weight": (heads, dim)} for path, heads in norms)
    return tuple({f"{path}.weight": (dim * heads if config.projection_norm else dim,)} for path, heads in norms)


def held_norms(config: ModelConfig, shard: Shard) -> tuple[list[tuple[str, tuple[slice, ...]]], ...]:
    """Those tensors, and the part of each that a rank holds: of weights for each head, those of its heads."""
    heads = shard.part(config.num_heads, 1), shard.part(config.num_kv_heads, 1, may_share=True)
    return tuple(_held_norm(config, [*norm], own) for norm, own in zip(query_key_norms(config), heads, strict=False))


def _held_norm(config: ModelConfig, names: list[str], heads: slice) -> list[tuple[str, tuple[slice, ...]]]:
    if config.head_norm == "apart":
        return [(name, ()) for name in names[heads]]
    if config.head_norm == "together":
        return [(name, (heads,)) for name in names]
    if config.projection_norm:
        return [(name, (slice(heads.start * config.head_dim, heads.stop * config.head_dim),)) for name in names]
    return [(name, ()) for name in names]


def final_norm(config: ModelConfig) -> str:
    """The path in a checkpoint of the norm before the head."""
    return f"model.{config.final_norm}"


def norm_tensors(config: ModelConfig, path: str) -> tuple[str, ...]:
    """The tensors of the norm at a path."""
    return (f"{path}.weight", f"{path}.bias") if config.norm_bias else (f"{path}.weight",)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for linear in layer_linears(config, layer):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _linear_shapes(linear)}
        if config.attention_sinks:
            shapes[f"model.layers.{layer}.{SINKS}"] = (config.num_heads,)
        for vector, shape in config.feed_forwards[layer].vectors().items():
            shapes[f"model.layers.{layer}.{vector}"] = shape
        for norm in residual_norms(config):
            for name in norm_tensors(config, f"model.layers.{layer}.{norm}"):
                shapes[name] = (config.hidden_size,)
        for name, size in latent_norms(config).items():
            shapes[f"model.layers.{layer}.{name}"] = (size,)
        for tensors in query_key_norms(config):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    for name in norm_tensors(config, final_norm(config)):
        shapes[name] = (config.hidden_size,)
    if config.head_bias:
        shapes[HEAD_BIAS] = (config.vocab_size,)
    if config.classifier is not None:
        return shapes | _classifier_shapes(config, config.classifier)
    if not config.tie_word_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    return shapes


def _classifier_shapes(config: ModelConfig, classifier: ClassifierFacts) -> dict[str, tuple[int, ...]]:
    weight = {CLASSIFIER: (classifier.num_labels, config.hidden_size)}
    return weight | ({CLASSIFIER_BIAS: (classifier.num_labels,)} if config.classifier_bias else {})


def _linear_shapes(linear: FusedLinear) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a linear inside a layer, and their shapes; of an expert those of all, where they are stacked."""
    stack = linear.stack
    if stack is None or not stack.stored:
        for part, out_features in stored_shapes(linear):
            yield f"{part}.weight", (out_features, linear.in_features)
            if linear.bias:
                yield f"{part}.bias", (out_features,)
    elif stack.index == 0:
        out_features = sum(size for _, size in linear.parts)
        matrix = (linear.in_features, out_features) if stack.transposed else (out_features, linear.in_features)
        yield stack.path, (stack.count, *matrix)
        if linear.bias:
            yield stack.bias, (stack.count, out_features)


def quantizable_linears(config: ModelConfig) -> Iterator[LinearShape]:
    """Every linear that a format may have quantised: those of the layers, and the head, be it the embedding."""
    for layer in range(config.num_layers):
        for linear in layer_linears(config, layer):
            yield from _quantizable_parts(f"model.layers.{layer}.", linear)
    if config.generates:
        yield LinearShape(head_module(config), config.vocab_size, config.hidden_size, config.head_bias)


def _quantizable_parts(prefix: str, linear: FusedLinear) -> Iterator[LinearShape]:
    stack, columns = linear.stack, linear.in_features
    if stack is None or not stack.stored:
        for part, rows in stored_shapes(linear):
            yield LinearShape(prefix + part, rows, columns, linear.bias)
    elif stack.index == 0:
        for _, rows in stored_shapes(linear):
            yield LinearShape(prefix + stack.path, rows, columns, linear.bias, stack.count, stack.transposed)


def head_module(config: ModelConfig) -> str:
    """The module that has the matrix of the head in a checkpoint."""
    return EMBEDDING.removesuffix(".weight") if config.tie_word_embeddings else HEAD_MODULE


def site_name(layer: int, linear: FusedLinear) -> str:
    return f"layers.{layer}.{linear.name}"


def norm_site(layer: int, module: str) -> str:
    return f"layers.{layer}.{module}"


def lora_targets(config: ModelConfig, shard: Shard) -> dict[str, LoraTarget]:
    """The modules that adapters may name: each projection, each fused linear as a whole, embedding, head, norms."""
    embedding, head = EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")
    hidden, vocabulary = config.hidden_size, config.vocab_size
    norm = LoraTarget("", 0, 0, hidden, TargetKind.NORM)
    rows = shard.stretch(vocabulary)
    share = None if shard.world == 1 else Share(vocabulary, hidden, (rows,), slice(0, hidden), adds_bias=True)
    tied_to = embedding if config.tie_word_embeddings else None
    held = rows.stop - rows.start
    targets = {
        embedding: LoraTarget(EMBEDDING_SITE, vocabulary, 0, hidden, TargetKind.EMBEDDING),
        **dict.fromkeys(CLASSIFIER_MODULES, LoraTarget(CLASSIFIER_SITE, hidden, 0, 0, TargetKind.CLASSIFIER)),
    }
    if config.generates:
        targets[head] = LoraTarget(HEAD_SITE, hidden, 0, held, tied_to=tied_to, reaches_cache=False, share=share)
    targets = {path: replace(target, is_elsewhere=not shard.is_first) for path, target in targets.items()}
    targets[final_norm(config)] = replace(norm, site=FINAL_NORM_SITE, is_elsewhere=not shard.is_last)
    own = shard.layers(config.num_layers)
    for layer in range(config.num_layers):
        elsewhere = layer not in own
        for module in residual_norms(config):
            site = norm_site(layer, module)
            targets[f"model.layers.{layer}.{module}"] = replace(norm, site=site, is_elsewhere=elsewhere)
        for linear in layer_linears(config, layer):
            for module, target in _linear_targets(site_name(layer, linear), linear, shard).items():
                is_last = layer == config.num_layers - 1 and module.rpartition(".")[2] in BEHIND_CACHE
                path = f"model.layers.{layer}.{module}"
                targets[path] = replace(target, reaches_cache=not is_last, is_elsewhere=elsewhere)
            if linear.stack is not None:
                whole = f"model.layers.{layer}.{linear.module}"
                stacks = (f"model.layers.{layer}.{linear.stack.path}",)
                targets[whole] = replace(targets[whole], stacks=stacks, stacked_transposed=linear.stack.unknown)
    return _under_all_names(targets, config.aliases)


def _under_all_names(targets: dict[str, LoraTarget], aliases: Sequence[tuple[str, str]]) -> dict[str, LoraTarget]:
    """The targets, and those of them once more that are called otherwise elsewhere."""
    found = dict(targets)
    for alias, ours in aliases:
        for path, target in targets.items():
            stacks = tuple(stack.replace(ours, alias) for stack in target.stacks)
            if ours in path:
                found[path.replace(ours, alias)] = replace(target, stacks=stacks)
            elif stacks != target.stacks:
                found[path] = replace(target, stacks=(*found[path].stacks, *stacks))
    return found


def _linear_targets(site: str, linear: FusedLinear, shard: Shard) -> dict[str, LoraTarget]:
    """The projections of a linear and the linear as a whole, each with the part of it that the rank holds.

    Where a checkpoint has them as one, the model that adapters were trained beside has no projections by themselves.
    """
    kind = TargetKind.LINEAR if linear.stack is None else TargetKind.EXPERT
    dtype = torch.float32 if linear.in_float32 else None
    targets, all_rows, start, whole_start = {}, [], 0, 0
    for (module, size), (rows, columns) in zip(linear.parts, held_parts(linear, shard), strict=True):
        share = Share(size, linear.in_features, (rows,), columns, adds_bias(linear, shard), linear.unit)
        targets[module] = LoraTarget(site, share.num_columns, start, share.num_rows, kind, share=share, dtype=dtype)
        all_rows.append(slice(whole_start + rows.start, whole_start + rows.stop))
        start, whole_start = start + share.num_rows, whole_start + size
    share = replace(share, out_features=whole_start, rows=tuple(all_rows))
    whole = {linear.module: LoraTarget(site, share.num_columns, 0, start, kind, share=share, dtype=dtype)}
    return whole if linear.stored_fused else targets | whole
