"""Loads a model that can run from a model directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraplex_adapters.runtime.layer import EMBEDDING_SITE, AdaptedNorm, LayerNorm, LoRAEmbedding, LoRALinear, RMSNorm
from loraplex_adapters.runtime.replaced import ReplacementSite
from loraplex_engine.checkpoint.config_source import read_config
from loraplex_engine.checkpoint.memory import release_free_memory
from loraplex_engine.checkpoint.model_config import (
    FeedForward,
    FeedForwardLayout,
    FusedLinear,
    LayerAttention,
    ModelConfig,
    ModelError,
    Stack,
)
from loraplex_engine.checkpoint.tensor_files import Part
from loraplex_engine.checkpoint.weights import Checkpoint, Progress, aliased_name
from loraplex_engine.layers.divided import DividedHead, SummedFeedForward, SummedLinear
from loraplex_engine.layers.linear import AnyLinear, Linear, SideBySide
from loraplex_engine.layers.projection_norm import NO_NORMS, QueryKeyNorms, norms_of, unit_heads
from loraplex_engine.layers.projections import FusedProjections, LatentProjections, Projections
from loraplex_engine.layers.query_scale import QueryScale, growth_table
from loraplex_engine.layers.rotary import cos_sin_table
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models.classification import load_classifier
from loraplex_engine.models.decoder import DecoderLayer, Ends, LanguageModel
from loraplex_engine.models.layout import (
    EMBEDDING,
    FINAL_NORM_SITE,
    HEAD,
    HEAD_BIAS,
    HEAD_SITE,
    OUTPUT,
    SINKS,
    adds_bias,
    attention_linears,
    final_norm,
    head_module,
    held_norms,
    latent_norms,
    layer_linears,
    norm_site,
    norm_tensors,
    quantizable_linears,
    site_name,
    stored_parts,
    tensor_shapes,
)
from loraplex_engine.models.precision import (
    check_classifier,
    check_head_quantization,
    check_quantization,
    compute_dtype,
    quantization_label,
    rounded,
)
from loraplex_engine.models.registry import read_model_config
from loraplex_engine.quantization import (
    QuantizedReader,
    base_names,
    cut,
    read_spec,
    round_to_nearest,
)
from loraplex_engine.ranks.exchange import ALONE, Ranks
from loraplex_kernels.ops import Ops
from loraplex_kernels.quantized import QuantizedWeight, concatenate

logger = logging.getLogger(__name__)

Held = Sequence[tuple[str, slice, slice]]  # tensors' paths, and the rows and columns of them that the rank holds
Matrix = Sequence[Tensor] | QuantizedWeight  # dense: tensors [N₁, C], [N₂, C], … one above the other


def load_model(
    config: EngineConfig, path: Path, ops: Ops, progress: Progress | None = None, ranks: Ranks = ALONE
) -> LanguageModel:
    """Load the model in `path`, a directory or a GGUF file, or a rank's share of it, for the device of `ops`.

    Raises ModelError if it is of no known family, or its weights are not all that its config.json asks for.
    """
    model_config = read_model_config(path, config.rope_scaling)
    check_classifier(config, model_config, path)
    raw = read_config(path)
    spec = read_spec(path, raw)
    check_quantization(config, spec, path)
    names = partial(aliased_name, model_config.aliases)
    with Checkpoint(path, model_config.unused_tensors, progress, base_names(path, raw), names) as checkpoint:
        if checkpoint.passed_over:
            logger.info(
                "%s: %d tensors are passed over (%s …): text alone is served",
                model_config.architecture,
                checkpoint.passed_over.total(),
                " …, ".join(checkpoint.passed_over),
            )
        model_config = as_stored(model_config, checkpoint)
        expected = tensor_shapes(model_config)
        if model_config.generates and HEAD in checkpoint:  # some files hold a tied head a second time
            expected[HEAD] = expected[EMBEDDING]
        quantised = None
        if spec is not None:
            quantised = QuantizedReader(checkpoint, spec, quantizable_linears(model_config))
            for name in quantised.replaced:
                expected.pop(name, None)
            check_head_quantization(config, quantised, head_module(model_config), path)
        checkpoint.check(expected, None if quantised is None else quantised.expected)
        model_config = replace(model_config, quantization=quantization_label(config, spec))
        longest = model_config.max_position_embeddings
        num_positions = min(config.max_model_len or longest, longest)
        dtype = compute_dtype(config.dtype, model_config.dtype, checkpoint.dtype(EMBEDDING))
        if dtype is torch.float16 and not model_config.fits_float16:
            raise ModelError(
                f"{path}: dtype float16 is asked for, and the activations of {model_config.architecture} exceed its "
                "range: choose bfloat16 or float32"
            )
        return _Loader(model_config, checkpoint, quantised, ops, dtype, num_positions, config, ranks).load()


def as_stored(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config with its feed-forwards in the form that the checkpoint has them."""

    def stored(layer: int, layout: FeedForwardLayout) -> FeedForwardLayout:
        return layout.as_stored(lambda path: f"model.layers.{layer}.{path}" in checkpoint)

    return replace(config, feed_forwards=tuple(stored(*each) for each in enumerate(config.feed_forwards)))


class _Loader:
    """The state of loading one model. Each tensor is read once, straight to its place."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        quantised: QuantizedReader | None,
        ops: Ops,
        dtype: torch.dtype,
        num_positions: int,
        engine: EngineConfig,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.quantised = quantised
        self.ops = ops
        self.dtype = dtype
        self.num_positions = num_positions
        self.ranks = ranks
        self.shard = ranks.shard
        self.is_divided = ranks.shard.world > 1
        self.num_slots = engine.max_resident_adapters
        self.rounding = engine.quantization  # of a dense checkpoint, while it is loaded
        self.head_rounding = engine.head_quantization
        self.replaced = ReplacementSite(ops.device)
        self.held_layers = self.shard.layers(config.num_layers)
        attentions = [config.layers[index] for index in self.held_layers]
        self.cos_sin = {
            rope: cos_sin_table(rope, config.head_dim, num_positions, ops.device)
            for rope in {layer.rope for layer in attentions}
        }
        self.nbytes = sum(table.nbytes for table in self.cos_sin.values())
        self.growths = {
            growth: growth_table(growth, num_positions, dtype, ops.device)
            for growth in {layer.growth for layer in attentions}
            if growth is not None
        }
        chunks = {self._felt(layer.chunk) for layer in attentions}
        if any(chunk is not None and chunk % engine.block_size for chunk in chunks):
            raise ModelError(
                f"{config.architecture} attends within parts of its sequences (attention_chunk_size), which blocks of "
                f"{engine.block_size} tokens do not divide: choose another block_size"
            )

    def load(self) -> LanguageModel:
        ends = self._ends() if self.shard.is_first else None
        layers = [self._layer(index) for index in self.held_layers]
        last_norm = self._adapted_norm(FINAL_NORM_SITE, final_norm(self.config)) if self.shard.is_last else None
        return LanguageModel(
            self.config, self.ops, self.dtype, ends, layers, last_norm, self.replaced, self.nbytes, self.ranks
        )

    def _ends(self) -> Ends:
        embedding = self._rows([(EMBEDDING, ())], self.dtype)
        # The largest matrix goes first: while it is packed it takes its room twice, and nothing else is there yet.
        head = self._lora_head(self._head(embedding)) if self.config.generates else None
        classifier = load_classifier(self.config, self.checkpoint, self.ops.device)
        self.nbytes += embedding.nbytes + (0 if classifier is None else classifier.nbytes)
        return Ends(
            LoRAEmbedding(embedding, self.replaced.table.at(EMBEDDING_SITE)),
            head,
            partial(rounded, self.head_rounding) if self.head_rounding is not None else None,
            classifier,
        )

    def _layer(self, index: int) -> DecoderLayer:
        prefix, attention, norms = f"model.layers.{index}.", self.config.layers[index], self.config.norms
        linears = [self._fused(index, prefix, linear) for linear in layer_linears(self.config, index)]
        *inputs, o = linears[: len(attention_linears(self.config))]
        on_heads = self._query_key_norms(prefix, attention)
        growth = None if attention.growth is None else self.growths[attention.growth]
        scaled = on_heads.query_factor is not None or growth is not None
        return DecoderLayer(
            projections=self._projections(prefix, inputs, on_heads),
            o=o,
            feed_forward=self._feed_forward(index, linears[len(inputs) + 1 :]),
            norm_before_attention=self._layer_norm(index, norms.before_attention),
            norm_before_mlp=self._layer_norm(index, norms.before_mlp),
            norm_after_attention=self._layer_norm(index, norms.after_attention),
            norm_after_mlp=self._layer_norm(index, norms.after_mlp),
            qk_norm=on_heads.of_kernels,
            query_scale=QueryScale(on_heads.query_factor, growth) if scaled else None,
            cos_sin=self.cos_sin[attention.rope],
            interleaved=attention.rope is not None and attention.rope.interleaved,
            window=self._felt(attention.window),
            chunk=self._felt(attention.chunk),
            sinks=self._vector([(prefix + SINKS, self._heads)]) if self.config.attention_sinks else None,
        )

    def _projections(self, prefix: str, linears: Sequence[LoRALinear], on_heads: QueryKeyNorms) -> Projections:
        if self.config.latent is None:
            return FusedProjections(linears[0], on_heads.of_projections)
        norm, *of_queries = (self._vector([(prefix + name, ())]) for name in latent_norms(self.config))
        *queries, to_latent, from_latent = linears
        query_norm = of_queries[0] if of_queries else None
        return LatentProjections(self.ops, self.config.latent, queries, to_latent, from_latent, query_norm, norm)

    def _feed_forward(self, index: int, linears: Sequence[LoRALinear]) -> FeedForward:
        layout = self.config.feed_forwards[index]
        vectors = [self._vector([(f"model.layers.{index}.{path}", ())]) for path in layout.vectors()]
        built = layout.build(self.ops, linears, vectors)
        return SummedFeedForward(built, self.ranks) if self.is_divided else built

    @property
    def _heads(self) -> Part:
        return (self.shard.part(self.config.num_heads, 1),)

    def _vector(self, parts: Sequence[tuple[str, Part]]) -> Tensor:
        """float32, the parts one after another."""
        vector = self.checkpoint.stacked(parts, torch.float32, self.ops.device)
        self.nbytes += vector.nbytes
        return vector

    def _query_key_norms(self, prefix: str, attention: LayerAttention) -> QueryKeyNorms:
        if self.config.unit_heads and attention.rope is not None:
            return unit_heads(self.config, self.ops.device)
        parts = [[(prefix + name, part) for name, part in norm] for norm in held_norms(self.config, self.shard)]
        if not parts:
            return NO_NORMS
        query, key = (self._norm(names) for names in parts)
        return norms_of(self.config, self.ops, query, key, self.dtype, self.ranks)

    def _felt(self, window: int | None) -> int | None:
        """The window or the chunk of a layer; None: it has none, or no sequence is longer.

        Files state windows too large for kernels.
        """
        return None if window is None or window >= self.num_positions else window

    def _fused(self, index: int, prefix: str, linear: FusedLinear) -> LoRALinear:
        held = [(prefix + path, rows, columns) for path, rows, columns in stored_parts(linear, self.shard)]
        dtype = torch.float32 if linear.in_float32 else self.dtype
        if linear.stack is not None and linear.stack.stored:
            weights, biases = self._stacked(prefix, linear.stack, held)
        else:
            weights = self._weights(held, None if linear.kept_dense else self.rounding, dtype)
            biases = [(f"{path}.bias", (rows,)) for path, rows, _ in held]
        bias = self._bias(biases, adds_bias(linear, self.shard), dtype) if linear.bias else None
        found, replaced = self._linear(weights, bias, dtype), self.replaced.table.at(site_name(index, linear))
        if self.is_divided and linear.name == OUTPUT:
            return SummedLinear(self.ops, found, self.num_slots, replaced, self.ranks)
        return LoRALinear(self.ops, found, self.num_slots, replaced)

    def _bias(self, parts: Sequence[tuple[str, Part]], adds: bool, dtype: torch.dtype) -> Tensor:
        bias = self._rows(parts, dtype).flatten()
        return bias if adds else bias.zero_()

    def _stacked(self, prefix: str, stack: Stack, held: Held) -> tuple[list[Matrix], list[tuple[str, Part]]]:
        """An expert's matrices where the checkpoint has those of all as one tensor, and where its biases lie."""
        own = slice(stack.index, stack.index + 1)
        biases: list[tuple[str, Part]] = [(prefix + stack.bias, (own, rows)) for _, rows, _ in held]
        if self.quantised is not None and prefix + stack.path in self.quantised:
            read = self.quantised.read
            return [read(prefix + stack.path, self.ops.device, at[1:], stack.index) for at in held], biases
        whole = self.rounding is not None  # before it is cut, a matrix is rounded
        found: list[Tensor] = []
        for _, rows, columns in held:
            part: Part = (own,) if whole else (own, columns, rows) if stack.transposed else (own, rows, columns)
            matrix = self.checkpoint.dense(prefix + stack.path, self.dtype, self.ops.device, part)[0]
            found.append((matrix.t() if stack.transposed else matrix).contiguous())
        if self.rounding is None:
            return [found], biases
        return [
            cut(round_to_nearest(each, self.rounding), *at[1:]) for each, at in zip(found, held, strict=True)
        ], biases

    def _lora_head(self, linear: AnyLinear) -> LoRALinear:
        replaced = self.replaced.table.at(HEAD_SITE)
        if self.is_divided:
            return DividedHead(self.ops, linear, self.num_slots, replaced, self.ranks, self.config.vocab_size)
        return LoRALinear(self.ops, linear, self.num_slots, replaced)

    def _weights(self, held: Held, rounding: str | None, dtype: torch.dtype) -> list[Matrix]:
        """The weights of projections that are multiplied as one: as few matrices as possible, rows in order."""
        quantised = self.quantised
        if rounding is None and (quantised is None or not any(path in quantised for path, *_ in held)):
            return [self._dense([(f"{path}.weight", (rows, columns)) for path, rows, columns in held], dtype)]
        found: list[Matrix] = []
        for path, rows, columns in held:
            weight = self._weight(path, (rows, columns), rounding, dtype)
            joined = None
            if found and not isinstance(weight, Sequence) and not isinstance(found[-1], Sequence):
                joined = concatenate((found[-1], weight))
            if joined is None:
                found.append(weight)
            else:
                found[-1] = joined
        return found

    def _weight(self, path: str, part: tuple[slice, slice], rounding: str | None, dtype: torch.dtype) -> Matrix:
        if self.quantised is not None and path in self.quantised:
            return self.quantised.read(path, self.ops.device, part)
        if rounding is None:
            return self._dense([(f"{path}.weight", part)], dtype)
        # Rounded before it is cut, so that a weight becomes the same however many ranks there are.
        return cut(round_to_nearest(self._dense([(f"{path}.weight", ())], dtype)[0], rounding), *part)

    def _dense(self, parts: Sequence[tuple[str, Part]], dtype: torch.dtype) -> list[Tensor]:
        """The rows of several tensors, one after another; straight from the mapped file if packing copies them."""
        if self.ops.packing_copies:
            return [self.checkpoint.dense(name, dtype, self.ops.device, part) for name, part in parts]
        return [self._rows(parts, dtype)]

    def _head(self, embedding: Tensor) -> AnyLinear:
        module = head_module(self.config)
        rows = self.shard.stretch(self.config.vocab_size)
        part = rows, slice(0, self.config.hidden_size)
        bias = self._rows([(HEAD_BIAS, (rows,))], self.dtype) if self.config.head_bias else None
        if self.quantised is not None and module in self.quantised:
            return self._linear([self.quantised.read(module, self.ops.device, part)], bias, self.dtype)
        weight = self._head_weight(embedding, part)
        if self.head_rounding is None:
            return self._linear([weight], bias, self.dtype)
        return self._linear([round_to_nearest(weight[0], self.head_rounding)], bias, self.dtype)

    def _head_weight(self, embedding: Tensor, part: tuple[slice, slice]) -> list[Tensor]:
        """The rank's rows of the head's matrix; if the model ties them, the embedding's."""
        if HEAD not in self.checkpoint:
            return [embedding[part]]
        if not self.config.tie_word_embeddings:
            return self._dense([(HEAD, part)], self.dtype)
        if torch.equal(self._rows([(HEAD, ())], self.dtype), embedding):
            return [embedding[part]]
        raise ModelError(
            f"{self.checkpoint.directory}: config.json ties {HEAD} to {EMBEDDING}, but the weights hold another one: "
            "set tie_word_embeddings to false to use it, or remove it"
        )

    def _linear(self, weights: Sequence[Matrix], bias: Tensor | None, dtype: torch.dtype) -> AnyLinear:
        """One linear from these matrices, their rows one after another; bias [N] of all of them."""
        linears, start = [], 0
        for weight in weights:
            rows = sum(map(len, weight)) if isinstance(weight, Sequence) else len(weight.codes)
            part = None if bias is None else bias[start : start + rows]
            packed = (
                self.ops.pack_linear(weight, part)
                if isinstance(weight, Sequence)
                else self.ops.pack_quantized(weight, part, dtype)
            )
            linears.append(Linear(self.ops, packed, part))
            start += rows
        self.nbytes += sum(linear.nbytes for linear in linears)
        release_free_memory()
        return linears[0] if len(linears) == 1 else SideBySide(linears, bias)

    def _norm(self, parts: Sequence[tuple[str, Part]]) -> Tensor:
        return self._vector(parts).add_(self.config.norm_offset)

    def _layer_norm(self, index: int, path: str | None) -> AdaptedNorm | None:
        return None if path is None else self._adapted_norm(norm_site(index, path), f"model.layers.{index}.{path}")

    def _adapted_norm(self, site: str, path: str) -> AdaptedNorm:
        weight, *bias = (self._vector([(name, ())]) for name in norm_tensors(self.config, path))
        kind = (LayerNorm if self.config.layer_norm else RMSNorm)(self.ops, self.config.norm_eps)
        return AdaptedNorm(
            kind, weight, bias[0] if bias else None, self.config.norm_offset, self.replaced.table.at(site)
        )

    def _rows(self, parts: Sequence[tuple[str, Part]], dtype: torch.dtype) -> Tensor:
        return self.checkpoint.stacked(parts, dtype, self.ops.device)
