"""The modules that adapters may name, described by the model, and an adapter's tensors for one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from loraplex_adapters.files.names import LoraTensorName, Part

HEAD_MODULE = "lm_head"


class BaseWeight(Protocol):
    """The model's own weight at the place of an adapter."""

    @property
    def bias(self) -> Tensor | None: ...  # [N] of the whole linear

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows of the weight: float32 [end − start, C], on any device. Any thread may call it."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a linear's weight [N, C] that one of several ranks holds, and an adapter's part beside it."""

    out_features: int  # N
    in_features: int  # C
    rows: tuple[slice, ...]  # of N, one after another in the rank's linear
    columns: slice  # of C
    adds_bias: bool  # False: another rank does, and the ranks' outputs are summed up
    unit: int = 1  # of N, that stay together: the rows of a head

    @property
    def num_rows(self) -> int:
        return sum(rows.stop - rows.start for rows in self.rows)

    @property
    def num_columns(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def has_whole_rows(self) -> bool:
        return self.num_columns == self.in_features

    @property
    def is_part(self) -> bool:
        return self.num_rows < self.out_features or not self.has_whole_rows

    def held(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which of these rows of N the rank holds, and their places in its linear."""
        held = [row for own in self.rows for row in range(own.start, own.stop)]
        places = {row: place for place, row in enumerate(held)}
        which = [index for index, row in enumerate(rows) if row in places]
        return which, [places[rows[index]] for index in which]

    def cut(self, part: Part, tensor: Tensor) -> Tensor:
        """The rank's part of an adapter's tensor: A [R, C], B [N, R], weights [N, C], biases and magnitudes [N]."""
        if part in ("A", "tokens"):  # of tokens the rows are told by their ids
            return tensor[:, self.columns]
        found = [tensor[rows] for rows in self.rows]
        held = found[0] if len(found) == 1 else torch.cat(found)
        if part in ("bias", "lora_bias") and not self.adds_bias:
            return torch.zeros_like(held)
        return held[:, self.columns] if part in ("weight", "base", "again") else held


class TargetKind(Enum):
    LINEAR = "linear"
    EXPERT = "linear of an expert"  # cannot be replaced: its rows are not all rows of an adapter
    EMBEDDING = "embedding"  # a linear of one-hot rows: C is the vocabulary, N the width
    NORM = "norm"  # can be replaced, but takes no LoRA
    CLASSIFIER = "classification head"  # that the base need not have: C is the width, N what the adapter says


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A module that an adapter may name, and where its output lies in the linear that computes it.

    A model describes itself by a dict of these, keyed by the module's path in the Hugging Face model
    ("model.layers.0.self_attn.q_proj"), with the fused names ("….self_attn.qkv_proj") beside the parts.
    """

    site: str  # the linear: a key of the pool's sites
    in_features: int  # C
    out_start: int  # first column of the linear's output that belongs to this projection
    out_features: int  # N of the projection
    kind: TargetKind = TargetKind.LINEAR
    base: BaseWeight | None = None  # needed for DoRA, trained biases and copies of base weights
    tied_to: str | None = None  # the embedding whose weight this head shares
    rounding: Callable[[Tensor], Tensor] | None = None  # what became of the checkpoint's rows when the model was loaded
    stacks: tuple[str, ...] = ()  # of an expert: the paths of the parameter [E, N, C] that this is a part of
    stacked_transposed: bool = False  # the parameter is [E, C, N], of which PEFT does not know
    transposed: bool = False  # checkpoints have its weight as [C, N], and adapters that replace it, too
    dtype: torch.dtype | None = None  # that it is computed in; None: the model's
    reaches_cache: bool = True  # False: keys and values of no layer depend on it
    share: Share | None = None  # of a module that is divided: C and N above are the rank's; None: it is whole
    is_elsewhere: bool = False  # ranks of another stage have it: what is said of it here is checked, and not kept

    @property
    def whole_shape(self) -> tuple[int, int]:
        """N and C of the module in the model, on all ranks together."""
        held = self.share or self
        return held.out_features, held.in_features

    @property
    def columns(self) -> slice:
        return slice(self.out_start, self.out_start + self.out_features)


@dataclass(frozen=True, slots=True)
class Module:
    """All that the adapter's file holds for one module of the model."""

    name: str  # the model's
    target: LoraTarget
    parts: dict[Part, LoraTensorName] = field(default_factory=dict)  # an embedding's A and B under "A" and "B"

    @property
    def trained_name(self) -> str:
        """The module's path in the trained model, which PEFT's patterns match."""
        return next(iter(self.parts.values())).module

    @property
    def any_key(self) -> str:
        """Any of the module's keys, to name it in a message."""
        return next(iter(self.parts.values())).key

    @property
    def is_adapted(self) -> bool:
        return "A" in self.parts

    def key(self, part: Part) -> str:
        return self.parts[part].key

    def is_one_of(self, ends: Iterable[str]) -> str | None:
        """The name among these that means the module, by its path in the trained model or else in the served one."""
        return named_by(self.trained_name, ends) or named_by(self.name, ends)


def named_by(module: str, ends: Iterable[str]) -> str | None:
    """The name among these that ends a module's path, or the path of a module around it: as in PEFT, "norm" is every
    module that ends so, and "mlp" all that is in one."""
    parts = module.split(".")
    paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((end for end in ends if any(path.endswith(end) for path in paths)), None)
