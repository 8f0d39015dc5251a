"""GGUF: each matrix in blocks of a type of its own, which a file gives the more bits, the more it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.gguf_blocks import READERS, record_of
from loraplex_engine.checkpoint.weights import ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape
from loraplex_kernels.finite import all_finite
from loraplex_kernels.quantized import QuantizedWeight

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class GGUFSpec:
    types: Mapping[str, str]  # by the tensors' names

    @property
    def label(self) -> str:
        """All types, that of most matrices first."""
        return "-".join(("gguf", *(name for name, _ in Counter(self.types.values()).most_common())))

    @property
    def markers(self) -> tuple[str, ...]:
        return ()

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        return {WEIGHT: ExpectedTensor((linear.out_features, linear.in_features), tuple(READERS))}

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> QuantizedWeight:
        record = record_of(self.types[linear.path + WEIGHT], stored[WEIGHT])
        tensors = (getattr(record, field.name) for field in fields(record))
        if not all(all_finite(each) for each in tensors if isinstance(each, Tensor) and each.is_floating_point()):
            raise linear.error(WEIGHT, "holds NaN or Inf among its scales: the file is damaged, fetch it again")
        return record


def parse(section: ConfigFields) -> GGUFSpec:
    """The types that the file's own header states. Raises ModelError for a config.json that claims this form."""
    types = section.raw().get("types")
    if not isinstance(types, dict):
        raise section.error("quant_method", "gguf", "left to GGUF files themselves: name the file as the model")
    return GGUFSpec(types)
