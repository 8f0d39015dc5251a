"""Loads a model that transformers' own class computes: its weights by our reader, its linears ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraplex_adapters.runtime.classifier import CLASSIFIER_MODULES, CLASSIFIER_SITE
from loraplex_adapters.runtime.layer import EMBEDDING_SITE, LoRAEmbedding, LoRALinear, Site
from loraplex_adapters.runtime.replaced import ReplacementSite
from loraplex_adapters.runtime.targets import LoraTarget, TargetKind
from loraplex_engine.borrowed.attention import IMPLEMENTATION, LAYER, PagedAttention
from loraplex_engine.borrowed.classes import build, check_layers, class_of, parameters_without_memory, skeleton
from loraplex_engine.borrowed.comparison import compare
from loraplex_engine.borrowed.model import BorrowedFacts, BorrowedModel
from loraplex_engine.borrowed.modules import AdaptedEmbedding, AdaptedLinear, NormParameters, ReplaceableNorm
from loraplex_engine.borrowed.names import stored_names
from loraplex_engine.borrowed.outline import Outline
from loraplex_engine.borrowed.own_attention import replace_own_attention
from loraplex_engine.borrowed.step import CurrentStep
from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.memory import release_free_memory
from loraplex_engine.checkpoint.model_config import ModelError, NotBorrowedError
from loraplex_engine.checkpoint.pooling import read_pooling
from loraplex_engine.checkpoint.weights import Checkpoint, Progress, read_json
from loraplex_engine.layers.linear import Linear
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models.precision import (
    check_head_quantization,
    check_quantization,
    compute_dtype,
    quantization_label,
    rounded,
)
from loraplex_engine.models.registry import class_labels
from loraplex_engine.models.rope_reading import max_positions, read_partial_rope, with_rope_scaling
from loraplex_engine.quantization import QuantizedReader, base_names, read_spec, round_to_nearest
from loraplex_kernels.ops import Ops, PackedLinear

LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")  # what configurations call it


def load_borrowed(config: EngineConfig, path: Path, ops: Ops, progress: Progress | None = None) -> BorrowedModel:
    """Load the model in directory `path` for inference on the device of `ops`.

    Raises ModelError if transformers' class cannot serve it, or its weights are not all that the class asks for.
    """
    if path.is_file():
        raise NotBorrowedError(f"{path}: a GGUF file, which native families alone read")
    where, raw = str(path / "config.json"), read_json(path / "config.json")
    if config.rope_scaling is not None:
        raw = with_rope_scaling(raw, config.rope_scaling)
    spec = read_spec(path, raw)
    check_quantization(config, spec, path)
    with Checkpoint(path, base_names=base_names(path, raw), names=str) as stored:
        check_layers(raw, len(stored), where)
    cls, class_config = class_of(raw, where)
    outline = Outline(skeleton(cls, class_config, where), where)
    if config.rope_scaling is not None and not outline.turns:
        raise ModelError(f"{path}: rope_scaling is asked for, and {cls.__name__} turns nothing by one: leave it out")
    if outline.layers[0].shape.alibi and config.kv_cache_dtype != "auto":
        raise ModelError(
            f"{path}: kv_cache_dtype {config.kv_cache_dtype!r} is asked for, and the keys of {cls.__name__} hold "
            "positions (ALiBi), which rounding would change: leave it out"
        )
    names = stored_names(outline.model, outline.shapes.keys(), str(path))
    with Checkpoint(path, progress=progress, base_names=base_names(path, raw), names=names) as checkpoint:
        quantised = outline.check(checkpoint, spec)
        if quantised is not None:
            check_head_quantization(config, quantised, outline.head, path)
        dtype = compute_dtype(config.dtype, _stated_dtype(class_config), checkpoint.dtype(outline.embedding_weight))
        facts = _facts(raw, path, outline, config, quantization_label(config, spec, outline.head))
        with parameters_without_memory():
            model = build(cls, class_config, where)
        loaded = _Loader(model, facts, outline, checkpoint, quantised, ops, dtype, config).load()
    compare(loaded, ops, where)
    return loaded


def _facts(
    raw: Mapping[str, Any], path: Path, outline: Outline, config: EngineConfig, quantization: str
) -> BorrowedFacts:
    class_config, head = outline.model.config, outline.linears[outline.head]
    longest = next((length for name in LENGTHS if (length := getattr(class_config, name, None))), config.max_model_len)
    if not isinstance(longest, int):
        raise NotBorrowedError(f"{path}: states no length of sequences: set max_model_len")
    return BorrowedFacts(
        architecture=type(outline.model).__name__,
        vocab_size=head.out_features,
        hidden_size=head.in_features,
        num_layers=len(outline.layers),
        head_shape=outline.layers[0].shape.cached,
        max_position_embeddings=_max_positions(outline, longest, str(path / "config.json")),
        quantization=quantization,
        pooling=read_pooling(path),
        labels=class_labels(raw),
    )


def _max_positions(outline: Outline, stated: int, where: str) -> int:
    """The stated positions, as many times as the class's rotary embeddings stretch them."""
    sections = (outline.model.config.rope_parameters or {}) if outline.turns else {}
    of_layers = [section for section in sections.values() if isinstance(section, dict)] or [sections]
    fields = ConfigFields({"max_position_embeddings": stated}, where)
    ropes = [read_partial_rope(fields.changed_by(ConfigFields({"rope_parameters": each}, where))) for each in of_layers]
    return max_positions(ropes, fields)


def _stated_dtype(class_config: Any) -> str | None:
    return None if class_config.dtype is None else str(class_config.dtype).removeprefix("torch.")


class _Loader:
    """The state of loading one model. Each tensor is read once, straight to its place."""

    def __init__(
        self,
        model: Any,
        facts: BorrowedFacts,
        outline: Outline,
        checkpoint: Checkpoint,
        quantised: QuantizedReader | None,
        ops: Ops,
        dtype: torch.dtype,
        engine: EngineConfig,
    ) -> None:
        self.model = model
        self.facts = facts
        self.outline = outline
        self.checkpoint = checkpoint
        self.quantised = quantised
        self.ops = ops
        self.dtype = dtype
        self.engine = engine
        self.step = CurrentStep()
        self.replaced = ReplacementSite(ops.device)
        self.sites: dict[str, Site] = {}
        self.targets: dict[str, LoraTarget] = {}
        self.nbytes = 0

    def load(self) -> BorrowedModel:
        embedding = self._embedding()
        # The largest matrix goes first: while it is packed it takes its room twice, and nothing else is there yet.
        for name in (self.outline.head, *(each for each in self.outline.linears if each != self.outline.head)):
            self._linear(name, embedding)
        for name in self.outline.others:
            self._other(name)
        for path in self.outline.norms:
            self._norm(path)
        classifier = LoraTarget(CLASSIFIER_SITE, self.facts.hidden_size, 0, 0, TargetKind.CLASSIFIER)
        self.targets |= dict.fromkeys(CLASSIFIER_MODULES, classifier)
        self._attention()
        model, facts = self.model, self.facts
        return BorrowedModel(
            facts, self.ops, model, self.step, self.targets, self.sites, self.replaced, self.dtype, self.nbytes
        )

    def _embedding(self) -> Tensor:
        path = self.outline.embedding
        weight = self._read(self.outline.embedding_weight)
        if type(self.model.get_submodule(path)) is not nn.Embedding:  # one that computes more than rows
            self._put(self.outline.embedding_weight, weight)
            return weight
        adapted = LoRAEmbedding(weight, self.replaced.table.at(EMBEDDING_SITE))
        self.model.set_submodule(path, AdaptedEmbedding(adapted, self.step))
        self.sites[EMBEDDING_SITE] = adapted
        vocabulary, width = weight.shape
        self.targets[path] = LoraTarget(EMBEDDING_SITE, vocabulary, 0, width, TargetKind.EMBEDDING, adapted)
        return weight

    def _linear(self, name: str, embedding: Tensor) -> None:
        shape = self.outline.linears[name]
        bias = self._read(f"{name}.bias") if shape.has_bias else None
        weight = self._packed(name, bias, embedding)
        linear = Linear(self.ops, weight, bias)
        self.nbytes += linear.nbytes
        release_free_memory()
        adapted = LoRALinear(self.ops, linear, self.engine.max_resident_adapters, self.replaced.table.at(name))
        self.model.set_submodule(name, AdaptedLinear(adapted, self.step))
        self.sites[name] = adapted
        is_head, rounding = name == self.outline.head, None
        if is_head and self.engine.head_quantization is not None:
            rounding = partial(rounded, self.engine.head_quantization)
        self.targets[name] = LoraTarget(
            name,
            shape.in_features,
            0,
            shape.out_features,
            base=linear,
            tied_to=self.outline.embedding if is_head and self.outline.tied else None,
            rounding=rounding,
            transposed=name in self.outline.transposed,
        )

    def _packed(self, name: str, bias: Tensor | None, embedding: Tensor) -> PackedLinear:
        is_head = name == self.outline.head
        if self.quantised is not None and name in self.quantised:
            return self.ops.pack_quantized(self.quantised.read(name, self.ops.device), bias, self.dtype)
        weight = self._head_weight(embedding) if is_head else self._read(f"{name}.weight")
        if name in self.outline.transposed:
            weight = weight.t().contiguous()
        rounding = self.engine.head_quantization if is_head else self.engine.quantization
        if rounding is None:
            return self.ops.pack_linear([weight], bias)
        return self.ops.pack_quantized(round_to_nearest(weight, rounding), bias, self.dtype)

    def _head_weight(self, embedding: Tensor) -> Tensor:
        name = f"{self.outline.head}.weight"
        if not self.outline.tied or name not in self.checkpoint:
            return embedding if self.outline.tied else self._read(name)
        if torch.equal(self._read(name), embedding):
            return embedding
        raise ModelError(
            f"{self.checkpoint.directory}: config.json ties {name} to {self.outline.embedding_weight}, but the weights "
            "hold another one: set tie_word_embeddings to false to use it, or remove it"
        )

    def _other(self, name: str) -> None:
        kept = any(re.search(pattern, name) for pattern in self.outline.float32)
        self._put(name, self._read(name, torch.float32 if kept else self.dtype))

    def _norm(self, path: str) -> None:
        norm = self.model.get_submodule(path)
        self.model.set_submodule(path, ReplaceableNorm(norm, self.replaced.table.at(path), self.step))
        parameters = NormParameters(norm)
        (width,) = self.outline.shapes[f"{path}.weight"]
        base = None if parameters.bias is None else parameters
        self.targets[path] = LoraTarget(path, 0, 0, width, TargetKind.NORM, base)

    def _read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.outline.shapes[name]
        if not shape:
            return self.checkpoint.dense(name, dtype or self.dtype, self.ops.device, ()).clone()
        return self.checkpoint.stacked([(name, ())], dtype or self.dtype, self.ops.device)

    def _put(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        self.nbytes += tensor.nbytes
        if leaf in module._buffers:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    def _attention(self) -> None:
        """Bring the buffers to the device, and give every attention its layer of the cache."""
        self.model.to(self.ops.device)
        replace_own_attention(self.model, self.ops.device)
        self.model.config._attn_implementation = IMPLEMENTATION
        for index, layer in enumerate(self.outline.layers):
            paged = PagedAttention(self.ops, self.step, index, layer.shape, layer.window)
            setattr(self.model.get_submodule(layer.module), LAYER, paged)
