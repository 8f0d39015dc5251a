"""The one decoder that all families share: what differs between them is in its ModelConfig."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_adapters.runtime.classifier import CLASSIFIER_SITE, ClassifierHead, ClassifierSite, ClassifierTable
from loraplex_adapters.runtime.layer import EMBEDDING_SITE, AdaptedNorm, LoRAEmbedding, LoRALinear, Site
from loraplex_adapters.runtime.replaced import REPLACED_SITE, ReplacementSite
from loraplex_adapters.runtime.targets import BaseWeight, LoraTarget
from loraplex_engine.checkpoint.model_config import FeedForward, ModelConfig
from loraplex_engine.layers.chunks import within_chunks
from loraplex_engine.layers.mixture import MixtureLayout
from loraplex_engine.layers.projections import Projections
from loraplex_engine.layers.query_scale import QueryScale
from loraplex_engine.models.layout import (
    FINAL_NORM_SITE,
    HEAD_MODULE,
    HEAD_SITE,
    held_heads,
    layer_linears,
    lora_targets,
    norm_site,
    residual_norms,
    site_name,
)
from loraplex_engine.models.step_batch import StepBatch
from loraplex_engine.ranks.exchange import Ranks
from loraplex_kernels.ops import AttentionMetadata, LayerKV, LoraSegments, Ops, QKNorm

Seen = Mapping[int | None, AttentionMetadata]  # by the size of the chunks; None: of layers without


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The parameters of one layer."""

    projections: Projections
    o: LoRALinear
    feed_forward: FeedForward
    norm_before_attention: AdaptedNorm | None
    norm_before_mlp: AdaptedNorm | None
    norm_after_attention: AdaptedNorm | None
    norm_after_mlp: AdaptedNorm | None
    qk_norm: QKNorm | None
    query_scale: QueryScale | None
    cos_sin: Tensor  # float32 [max positions, 2, R/2], shared between layers of one kind
    interleaved: bool  # how cos_sin is meant
    window: int | None  # tokens
    chunk: int | None  # tokens
    sinks: Tensor | None  # float32 [H]

    @property
    def linears(self) -> tuple[LoRALinear, ...]:
        """The linears, in the order of `layout.layer_linears`."""
        return *self.projections.linears, self.o, *self.feed_forward.linears

    @property
    def norms(self) -> tuple[AdaptedNorm, ...]:
        """The norms, in the order of `layout.residual_norms`."""
        places = self.norm_before_attention, self.norm_before_mlp, self.norm_after_attention, self.norm_after_mlp
        return tuple(norm for norm in places if norm is not None)


@dataclass(frozen=True, slots=True)
class Ends:
    """What the first stage has beside layers: tokens come in there, and logits leave."""

    embedding: LoRAEmbedding
    head: LoRALinear | None  # None: the model has a classification head in its place
    head_rounding: Callable[[Tensor], Tensor] | None  # of the checkpoint's rows, while they were loaded
    classifier: ClassifierHead | None = None


class LanguageModel:
    """Token ids and a paged cache in, logits out. Holds parameters only: a step is all in its arguments.

    Of a model in several stages it is one: the first has the ends, the last the final norm. What it has not is None.
    """

    implementation = "native"

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        dtype: torch.dtype,
        ends: Ends | None,
        layers: Sequence[DecoderLayer],
        final_norm: AdaptedNorm | None,
        replaced: ReplacementSite,
        nbytes: int,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.shard = ranks.shard
        self.dtype = dtype
        self.nbytes = nbytes  # of all parameters
        self._ops = ops
        self._ranks = ranks
        self._ends = ends
        self._layers = dict(zip(self.shard.layers(config.num_layers), layers, strict=True))  # by their number
        self._final_norm = final_norm
        self._replaced = replaced
        self._classifiers = ClassifierSite(ops.device, None if ends is None else ends.classifier)
        self.num_layers = len(layers)
        self.head_shape = held_heads(config, self.shard)
        self._chunks = {layer.chunk for layer in layers if layer.chunk is not None}
        # How many rows each expert has is read back from the device, and so is where chunks end.
        experts = any(isinstance(layout, MixtureLayout) for layout in config.feed_forwards)
        # Graphs are of steps that draw: a classifier has none.
        self.capturable = not experts and not self._chunks and self.shard.processes == 1 and config.generates
        # Rounded as the weights are: 50.6 is 50.5 in bfloat16, and so the models were trained.
        scale = config.embedding_scale
        self._embedding_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype).item()

    def forward(self, batch: StepBatch, kv: Sequence[LayerKV]) -> Tensor:
        """The last hidden states, normed, of the rows in `batch.logits_rows` → [L, C]; of use on the first stage alone.

        Stores the keys and values of all rows in `kv`, one for each layer that it has.
        """
        residual = self._entered(batch)
        x = self._through(residual, batch, kv)
        rows = batch.logits_rows
        if self._final_norm is None:
            self._ranks.pass_on(residual.add_(x))
            returns = self.shard.is_first and len(rows)
            return self._ranks.take_over(x.new_empty(len(rows), x.shape[1])) if returns else x[:0]
        if not len(rows):  # every sequence is in the middle of its prompt
            return x[:0]
        x = self._final_norm.add(x.index_select(0, rows), residual.index_select(0, rows), batch.logits_lora)
        if not self.shard.is_first:
            self._ranks.pass_on(x)
        return x

    def _entered(self, batch: StepBatch) -> Tensor:
        """What the first layer here adds to: the embedded tokens, or what the stage before has made of them.  [T, C]"""
        if self._ends is None:
            shape = len(batch.token_ids), self.config.hidden_size
            return self._ranks.take_over(torch.empty(shape, dtype=self.dtype, device=self._ops.device))
        residual = self._ends.embedding(batch.token_ids, batch.lora)
        if self._embedding_scale is not None:
            residual *= self._embedding_scale
        return residual

    def _through(self, residual: Tensor, batch: StepBatch, kv: Sequence[LayerKV]) -> Tensor:
        """Through all layers here: what is still to be added to the residual, which changes.  [T, C] → [T, C]"""
        lora, seen, layers = batch.lora, self._seen(batch.attention, kv), [*self._layers.values()]
        first = layers[0].norm_before_attention
        x = residual if first is None else first(residual, lora)
        for index, layer in enumerate(layers):
            if self.config.parallel:
                x = self._both(layer, x, residual, batch, seen, kv[index])
            else:
                x = self._attention(layer, x, batch, seen, kv[index])
                x = _added(self._sized(x, layer.norm_after_attention, lora), residual, layer.norm_before_mlp, lora)
                x = self._sized(layer.feed_forward(x, lora), layer.norm_after_mlp, lora)
            if index + 1 < len(layers):
                x = _added(x, residual, layers[index + 1].norm_before_attention, lora)
        return x

    def logits(self, hidden: Tensor, lora: LoraSegments | None = None) -> Tensor:
        """The next token's logits, for hidden states as `forward` returns them: [L, C] → float32 [L, V].

        lora: which of these rows belong to which adapter (`StepBatch.logits_lora`, or a part of it). Of the first stage
        alone.
        """
        assert self._ends is not None, "only the first stage has the head"
        assert self._ends.head is not None, "checked when the request came"
        logits = self._ends.head(hidden, lora).float()
        if self.config.logits_scale is not None:
            logits *= self.config.logits_scale
        cap = self.config.logits_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    @property
    def classifiers(self) -> ClassifierTable:
        """The classification heads, for hidden states as `forward` returns them."""
        return self._classifiers.table

    def can_be_captured(self, lora: LoraSegments | None) -> bool:
        """Whether a captured graph can replace `forward`: it cannot for adapters that do more than their
        tables beside the linears say, to the embedding or in place of parameters."""
        embedded = {} if self._ends is None else self._ends.embedding.table.adapters
        eager = self._replaced.table.slots | embedded.keys()
        return lora is None or not eager or not any(slot in eager for slot, _, _ in lora.ranges)

    def lora_targets(self) -> dict[str, LoraTarget]:
        """The modules that an adapter may change, by their path in the Hugging Face model."""
        bases: dict[str, BaseWeight] = {site: linear.linear for site, linear in self._linears().items()}
        if self._ends is not None:
            bases[EMBEDDING_SITE] = self._ends.embedding
        bases |= {site: norm for site, norm in self._norms().items() if norm.bias is not None}
        targets = lora_targets(self.config, self.shard)
        targets = {path: replace(target, base=bases.get(target.site)) for path, target in targets.items()}
        if self._ends is not None and self._ends.head is not None:
            targets[HEAD_MODULE] = replace(targets[HEAD_MODULE], rounding=self._ends.head_rounding)
        return targets

    def lora_sites(self) -> dict[str, Site]:
        """The places of adapters, by the names that the targets refer to."""
        sites: dict[str, Site] = {**self._linears(), REPLACED_SITE: self._replaced, CLASSIFIER_SITE: self._classifiers}
        return sites if self._ends is None else {**sites, EMBEDDING_SITE: self._ends.embedding}

    def adapted_linears(self) -> Iterator[tuple[LoRALinear, int]]:
        """Each linear of the layers, and the projections in it."""
        for index, layer in self._layers.items():
            for spec, linear in zip(layer_linears(self.config, index), layer.linears, strict=True):
                yield linear, len(spec.parts)

    def _linears(self) -> dict[str, LoRALinear]:
        linears = {
            site_name(index, spec): linear
            for index, layer in self._layers.items()
            for spec, linear in zip(layer_linears(self.config, index), layer.linears, strict=True)
        }
        head = None if self._ends is None else self._ends.head
        return linears if head is None else {**linears, HEAD_SITE: head}

    def _norms(self) -> dict[str, AdaptedNorm]:
        norms = {
            norm_site(index, path): norm
            for index, layer in self._layers.items()
            for path, norm in zip(residual_norms(self.config), layer.norms, strict=True)
        }
        return norms if self._final_norm is None else {**norms, FINAL_NORM_SITE: self._final_norm}

    def _seen(self, metadata: AttentionMetadata, kv: Sequence[LayerKV]) -> Seen:
        seen: dict[int | None, AttentionMetadata] = {None: metadata}
        for chunk in self._chunks:
            seen[chunk] = within_chunks(metadata, chunk, kv[0].block_size)
        return seen

    def _both(
        self, layer: DecoderLayer, x: Tensor, residual: Tensor, batch: StepBatch, seen: Seen, kv: LayerKV
    ) -> Tensor:
        """Attention and feed-forward side by side, each of what its norm makes of the residual.  → [T, C]"""
        norm = layer.norm_before_mlp
        read = x if norm is None else norm(residual, batch.lora)
        return self._attention(layer, x, batch, seen, kv).add_(layer.feed_forward(read, batch.lora))

    def _attention(self, layer: DecoderLayer, x: Tensor, batch: StepBatch, seen: Seen, kv: LayerKV) -> Tensor:
        """x: [T, C] → [T, C]"""
        ops, config = self._ops, self.config
        q = ops.rotary_store_kv(
            layer.projections(x, batch.lora),
            self.head_shape,
            layer.qk_norm,
            batch.positions,
            layer.cos_sin,
            kv,
            batch.attention.slot_mapping,
            layer.interleaved,
        )
        if layer.query_scale is not None:
            layer.query_scale(q, batch.positions)
        scale, cap = config.attention_scale, config.attention_soft_cap
        x = ops.paged_attention(q, kv, seen[layer.chunk], scale, layer.window, cap, layer.sinks)
        if config.value_dim != config.head_dim:  # behind a head's values there are zeros
            x = x.view(q.shape)[..., : config.value_dim].flatten(1)
        return layer.o(x, batch.lora)

    def _sized(self, x: Tensor, norm: AdaptedNorm | None, lora: LoraSegments | None) -> Tensor:
        """x as it is added to the residual: normed and scaled, if the model does so.  x: [T, C], may be overwritten"""
        if norm is not None:
            x = norm(x, lora)
        return x if self.config.residual_scale is None else x.mul_(self.config.residual_scale)


def _added(x: Tensor, residual: Tensor, norm: AdaptedNorm | None, lora: LoraSegments | None) -> Tensor:
    """residual += x in place; what the next part of the layer reads: its norm, or the sum itself.  [T, C]"""
    if norm is not None:
        return norm.add(x, residual, lora)
    return residual.add_(x)
