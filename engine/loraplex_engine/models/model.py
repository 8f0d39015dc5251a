"""The interface of a loaded model: what the runner needs of it, whoever computes its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraplex_adapters.runtime.classifier import ClassifierTable
from loraplex_adapters.runtime.layer import LoRALinear, Site
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_engine.link.pooling import ClassifierFacts, ModelPooling
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import HeadShape, LayerKV, LoraSegments


class Cached(Protocol):
    """What keys and values there are to be kept."""

    @property
    def num_layers(self) -> int: ...  # that have keys and values

    @property
    def head_shape(self) -> HeadShape: ...  # of what each layer keeps in the cache


class ModelFacts(Cached, Protocol):
    """What is known of a model without its weights. Its heads are those of all ranks together."""

    @property
    def architecture(self) -> str: ...  # as in config.json

    @property
    def vocab_size(self) -> int: ...  # V

    @property
    def hidden_size(self) -> int: ...  # C of the states that `forward` returns

    @property
    def max_position_embeddings(self) -> int: ...  # tokens

    @property
    def quantization(self) -> str: ...  # how the weights are stored, for people; "" for none

    @property
    def pooling(self) -> ModelPooling: ...

    @property
    def labels(self) -> tuple[str, ...]: ...  # of classes; empty: the checkpoint names none

    @property
    def classifier(self) -> ClassifierFacts | None: ...  # the head in place of a language model's; None: there is none


class Model(Cached, Protocol):
    """Token ids and a paged cache in, logits out. A step is all in its arguments. Its layers and heads are those of one
    rank."""

    @property
    def config(self) -> ModelFacts: ...

    @property
    def implementation(self) -> str: ...  # "native" or "transformers"

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...  # of all parameters

    @property
    def capturable(self) -> bool: ...  # whether a CUDA graph may capture `forward`

    @property
    def classifiers(self) -> ClassifierTable: ...  # the heads for hidden states as `forward` returns them

    def forward(self, batch: StepBatch, kv: Sequence[LayerKV]) -> Tensor:
        """The last hidden states, normed, of the rows in `batch.logits_rows` → [L, C].

        Stores the keys and values of all rows in `kv`, one for each layer.
        """

    def logits(self, hidden: Tensor, lora: LoraSegments | None = None) -> Tensor:
        """The next token's logits, for hidden states as `forward` returns them: [L, C] → float32 [L, V].

        lora: which of these rows belong to which adapter.
        """

    def can_be_captured(self, lora: LoraSegments | None) -> bool:
        """Whether a captured graph can replace `forward` for these adapters."""

    def lora_targets(self) -> dict[str, LoraTarget]:
        """The modules that an adapter may change, by their path in the Hugging Face model."""

    def lora_sites(self) -> dict[str, Site]:
        """The places of adapters, by the names that the targets refer to."""

    def adapted_linears(self) -> Iterator[tuple[LoRALinear, int]]:
        """Each linear with adapters beside it, and the projections in it that one adapter may change."""
