"""Float8 checkpoints (`quant_method: fp8`): e4m3 weights with a scale per block, as DeepSeek-V3's, or per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.spec import SCALE_TYPES, LinearShape, check_scales
from loraplex_kernels.quantized import Float8Weight

# transformers' names, then vLLM's. Both multiply.
SCALES = (".weight_scale_inv", ".weight_scale")
STACK_SCALE = "_scale"  # of experts whose matrices are one tensor, one for each output feature (Llama 4)
MX_BLOCK = 32
MAX_BLOCK = 1 << 16  # far more rows or columns than any file has in a block, and few enough to be computed with
E4M3_NAN = 0x7F  # and with the sign bit; the type has no infinity
ACTIVATION_SCALES = (".activation_scale", ".input_scale")


@dataclass(frozen=True, slots=True)
class Fp8Spec:
    block: tuple[int, int] | None  # None: one scale per tensor, or per row
    static_activations: bool  # the file brings scales for them, which 16-bit activations do not need

    label = "fp8"
    markers = (*SCALES, STACK_SCALE)

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n, c = linear.out_features, linear.in_features
        if linear.count is not None and linear.transposed:
            codes = ExpectedTensor((linear.count, c, n), ("F8_E4M3",))
            return {"": codes, STACK_SCALE: ExpectedTensor((linear.count, None, None), SCALE_TYPES)}
        shape = None if self.block is None else (-(-n // self.block[0]), -(-c // self.block[1]))
        scales = {name: ExpectedTensor(shape, SCALE_TYPES, optional=True) for name in SCALES}
        activations = ACTIVATION_SCALES if self.static_activations else ()
        return {
            ".weight": ExpectedTensor((n, c), ("F8_E4M3",)),
            **scales,
            **{name: ExpectedTensor(None, FLOATS, optional=True) for name in activations},
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> Float8Weight:
        if STACK_SCALE in stored:
            return float8_weight(linear, STACK_SCALE, stored[""].t().contiguous(), stored[STACK_SCALE], None)
        found = [name for name in SCALES if name in stored]
        if len(found) != 1:
            raise linear.error("", f"has {len(found)} of the scales {' and '.join(SCALES)}, and needs one")
        return float8_weight(linear, found[0], stored[".weight"], stored[found[0]], self.block)


def float8_weight(
    linear: LinearShape, suffix: str, codes: Tensor, scale: Tensor, block: tuple[int, int] | None
) -> Float8Weight:
    """A float8 weight with its scales. block None: `scale` holds one value, or one for each output feature."""
    scale = check_scales(linear, suffix, scale)
    if bool((codes.view(torch.uint8) & E4M3_NAN == E4M3_NAN).any()):
        raise linear.error(linear.weight.removeprefix(linear.path), "holds NaN: the checkpoint is damaged")
    if block is not None:
        return Float8Weight(codes, scale, block)
    if scale.numel() != 1 and scale.squeeze().shape != codes.shape[:1]:  # blocks may be as many as output features
        wanted = f"one, or {len(codes)}, one for each output feature"
        raise linear.error(suffix, f"has {scale.numel()} values: {wanted}, not {list(scale.shape)}")
    per_row = scale.flatten().expand(len(codes)).unsqueeze(1).contiguous()
    return Float8Weight(codes, per_row, (1, linear.in_features))


def parse(fields: ConfigFields) -> Fp8Spec:
    """Raises ModelError for what is not supported, naming the field."""
    if fields.text("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise fields.error("fmt", fields.text("fmt"), "e4m3")
    scheme = fields.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise fields.error("activation_scheme", scheme, "dynamic or static")
    return Fp8Spec(read_block(fields, "weight_block_size"), scheme == "static")


def parse_mxfp8(fields: ConfigFields) -> Fp8Spec:
    """The same, with an exponent for each 32 inputs where nothing else is stated."""
    return parse(fields.with_defaults({"weight_block_size": [1, MX_BLOCK]}))


def read_block(fields: ConfigFields, name: str) -> tuple[int, int] | None:
    """Rows and columns of a block; None: the field is absent."""
    block = fields.integers(name)
    if not block:
        return None
    if len(block) != 2 or min(block) < 1 or max(block) > MAX_BLOCK:
        raise fields.error(name, list(block), f"two numbers from 1 to {MAX_BLOCK}: rows and columns")
    return block[0], block[1]
