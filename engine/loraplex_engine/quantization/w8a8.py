"""int8 weights with a scale for each output feature, and inputs that are rounded token by token: LMDeploy's
`smooth_quant` and SGLang's `w8a8_int8`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.integers import integer_weight
from loraplex_engine.quantization.spec import LinearShape
from loraplex_kernels.quantized import InputRounding, IntegerWeight


@dataclass(frozen=True, slots=True)
class W8A8Spec:
    label: str
    scale: str  # the tensor's name

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.scale,)

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n, c = linear.out_features, linear.in_features
        return {".weight": ExpectedTensor((n, c), ("I8",)), self.scale: ExpectedTensor((n, 1), FLOATS)}

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> IntegerWeight:
        return integer_weight(linear, self.scale, stored[".weight"], stored[self.scale], InputRounding())


def parse_smooth_quant(fields: ConfigFields) -> W8A8Spec:
    """Raises ModelError for what is not supported, naming the field."""
    dtype = fields.text("quant_dtype", "int8")
    if dtype != "int8":
        raise fields.error("quant_dtype", dtype, "int8: others of LMDeploy's are not supported")
    return W8A8Spec("smooth-quant-w8a8", ".scale")


def parse_w8a8_int8(fields: ConfigFields) -> W8A8Spec:
    """Raises ModelError for what is not supported, naming the field."""
    if fields.has("config_groups"):
        raise fields.error("config_groups", "given", "absent: a file with groups is one of compressed-tensors")
    return W8A8Spec("w8a8-int8", ".weight_scale")
