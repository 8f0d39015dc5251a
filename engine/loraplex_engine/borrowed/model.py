"""A loaded model whose layers transformers' own class computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from loraplex_adapters.runtime.classifier import CLASSIFIER_SITE, ClassifierSite, ClassifierTable
from loraplex_adapters.runtime.layer import LoRALinear, Site
from loraplex_adapters.runtime.replaced import REPLACED_SITE, ReplacementSite
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_engine.borrowed.own_attention import WANTS_MASK
from loraplex_engine.borrowed.probe import takes_positions
from loraplex_engine.borrowed.step import CurrentStep
from loraplex_engine.link.pooling import ModelPooling
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import HeadShape, LayerKV, LoraSegments, Ops


@dataclass(frozen=True, slots=True)
class BorrowedFacts:
    """What is known of a model without its weights: see `models.model.ModelFacts`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    head_shape: HeadShape
    max_position_embeddings: int
    quantization: str
    pooling: ModelPooling
    labels: tuple[str, ...]
    classifier = None  # the classes are those of language models


@dataclass
class _GivenStates(BaseModelOutputWithPast):
    """Hidden states in the form in which a decoder returns them. What else a class reads of it is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class BorrowedModel:
    """Token ids and a paged cache in, logits out. A step's rows are one batch of the class, of one long sequence."""

    implementation = "transformers"
    capturable = False  # the class's code may read from the device

    def __init__(
        self,
        config: BorrowedFacts,
        ops: Ops,
        model: Any,  # of the class, its linears replaced
        step: CurrentStep,
        targets: Mapping[str, LoraTarget],
        sites: Mapping[str, Site],
        replaced: ReplacementSite,
        dtype: torch.dtype,
        nbytes: int,
    ) -> None:
        self.config = config
        self.num_layers = config.num_layers
        self.head_shape = config.head_shape
        self.dtype = dtype
        self.nbytes = nbytes
        self.module = model
        self._step = step
        self._targets = dict(targets)
        self._classifiers = ClassifierSite(ops.device)
        self._sites = {**sites, REPLACED_SITE: replaced, CLASSIFIER_SITE: self._classifiers}
        self._takes_positions = takes_positions(model)
        decoder = model.get_decoder()
        self._mask: dict[str, Tensor] = {}
        if type(decoder).__name__ in WANTS_MASK:
            self._mask["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ops.device)
        self._decode = decoder.forward
        decoder.forward = self._decode_or_give

    def forward(self, batch: StepBatch, kv: Sequence[LayerKV]) -> Tensor:
        """As `models.model.Model` has it."""
        step = self._step
        step.batch, step.kv, step.lora = batch, kv, batch.lora
        inputs = {"position_ids": batch.positions[None]} if self._takes_positions else {}
        try:
            found = self._decode(input_ids=batch.token_ids[None], use_cache=False, **inputs, **self._mask)
        finally:
            step.batch, step.kv, step.lora = None, (), None
        hidden: Tensor = found.last_hidden_state[0]
        return hidden.index_select(0, batch.logits_rows)

    def logits(self, hidden: Tensor, lora: LoraSegments | None = None) -> Tensor:
        """As `models.model.Model` has it: the class's own head, and what it does with its result."""
        step = self._step
        step.hidden, step.lora = hidden[None], lora
        try:
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.module(input_ids=ids, use_cache=False).logits[0]
            return logits.float()
        finally:
            step.hidden, step.lora = None, None

    @property
    def classifiers(self) -> ClassifierTable:
        return self._classifiers.table

    def can_be_captured(self, lora: LoraSegments | None) -> bool:
        return False

    def lora_targets(self) -> dict[str, LoraTarget]:
        return self._targets

    def lora_sites(self) -> dict[str, Site]:
        return dict(self._sites)

    def adapted_linears(self) -> Iterator[tuple[LoRALinear, int]]:
        for site in self._sites.values():
            if isinstance(site, LoRALinear):
                yield site, 1

    def _decode_or_give(self, *args: Any, **settings: Any) -> Any:
        """The decoder, in the place that the class calls it from; or the states that it had, for the head."""
        if self._step.hidden is not None:
            return _GivenStates(last_hidden_state=self._step.hidden)
        return self._decode(*args, **settings)
