"""A checkpoint of which single modules have a format of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from loraplex_adapters.files.pattern import ModulePattern
from loraplex_engine.checkpoint.config_fields import ConfigFields, shortened
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, QuantSpec
from loraplex_kernels.quantized import QuantizedWeight

MAX_PATTERN_CHARACTERS = 1 << 16  # of one object's patterns: all of them may be tried on each module


class Pattern(Protocol):
    """One of a file's, or one that `re` matches without trying again and again."""

    def match(self, path: str, /) -> object:
        """Something true if it matches a path from its beginning on."""


def read_patterns(fields: ConfigFields, texts: Mapping[str, str]) -> dict[str, ModulePattern]:
    """The patterns of an object's fields, by their names.

    Raises ModelError for one that is none, or that is not supported.
    """
    length = sum(map(len, texts.values()))
    if length > MAX_PATTERN_CHARACTERS:
        raise ModelError(
            f"{fields.where}: has patterns of module names of {length} characters in all; at most "
            f"{MAX_PATTERN_CHARACTERS} are read"
        )
    patterns = {}
    for name, text in texts.items():
        try:
            patterns[name] = ModulePattern(text)
        except ValueError as error:
            raise ModelError(f"{fields.where}: {shortened(name)} is no pattern of module names: {error}") from None
    return patterns


@dataclass(frozen=True, slots=True)
class ByModule:
    """Names count before patterns, and the general format where neither fits."""

    label: str
    general: QuantSpec | None  # None: only those modules are quantised that have one of their own
    names: Mapping[str, QuantSpec] = field(default_factory=dict)  # by path: files name thousands of experts
    patterns: tuple[tuple[Pattern, QuantSpec], ...] = ()  # the first that matches a path counts

    @property
    def markers(self) -> tuple[str, ...]:
        specs = (self.general, *self.names.values(), *(spec for _, spec in self.patterns))
        return tuple({marker for spec in specs if spec is not None for marker in spec.markers})

    def of(self, linear: LinearShape) -> QuantSpec:
        spec = self.names.get(linear.path)
        if spec is None:
            spec = next((spec for pattern, spec in self.patterns if pattern.match(linear.path)), self.general)
        if spec is None:
            raise linear.error("", f"is quantised, and config.json does not say how ({self.label})")
        return spec

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        return self.of(linear).tensors(linear)

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> QuantizedWeight:
        return self.of(linear).read(linear, stored)
