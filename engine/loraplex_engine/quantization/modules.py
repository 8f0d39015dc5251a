"""A checkpoint of which single modules have a format of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from loraplex_engine.checkpoint.weights import ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, QuantSpec
from loraplex_kernels.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class ByModule:
    """Names count before patterns, and the general format where neither fits."""

    label: str
    general: QuantSpec | None  # None: only those modules are quantised that have one of their own
    names: Mapping[str, QuantSpec] = field(default_factory=dict)  # by path: files name thousands of experts
    patterns: tuple[tuple[re.Pattern[str], QuantSpec], ...] = ()  # the first that matches a path counts

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
