"""torchao checkpoints as transformers writes them in safetensors: the tensors of a weight are `_weight_qdata` …"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor, canonical_name
from loraplex_engine.quantization.fp8 import float8_weight
from loraplex_engine.quantization.modules import ByModule, read_patterns
from loraplex_engine.quantization.spec import (
    LinearShape,
    QuantSpec,
    by_group,
    check_scales,
    group_count,
    require_multiple,
)
from loraplex_engine.quantization.unpacking import unpack_codes
from loraplex_kernels.quantized import AffineWeight, Float8Weight, MinimumWeight

CODES, SCALE, ZERO = "._weight_qdata", "._weight_scale", "._weight_zero_point"
SCALE_AND_ZERO = "._weight_scale_and_zero"
MIDDLE = 8  # of codes of 4 bits
# tinygemm multiplies tiles of so many outputs by so many inputs, and torchao pads to whole ones.
TILE_OUTPUTS, TILE_INPUTS, PADDED_INPUTS = 8, 128, 1024


@dataclass(frozen=True, slots=True)
class Bytes:
    """Signed integers of so many bits in a byte each, with scales and zero points [N, G].  Int8Tensor, Intx…Tensor."""

    bits: int
    group_size: int | None  # None: one scale for each row, or one alone

    markers = (CODES,)

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n, c = linear.out_features, linear.in_features
        groups = 1 if self.group_size is None else group_count(linear, self.group_size)
        shape = None if self.group_size is None else (n, groups)
        return {
            CODES: ExpectedTensor((n, c), ("I8",)),
            SCALE: ExpectedTensor(shape, FLOATS),
            ZERO: ExpectedTensor(shape, ("I8", "I32", *FLOATS), optional=True),
            **_of_activations("scale", "zero_point"),
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> AffineWeight:
        middle = 1 << (self.bits - 1)
        codes = stored[CODES].view(torch.uint8) + middle  # signed values become codes from 0 on
        if int(codes.max()) >= 2 * middle:
            raise linear.error(CODES, f"holds values outside {-middle} … {middle - 1}, the range of {self.bits} bits")
        group_size = min(self.group_size or linear.in_features, linear.in_features)
        groups = group_count(linear, group_size)
        scale = by_group(linear, SCALE, check_scales(linear, SCALE, stored[SCALE]), groups)
        zero = torch.zeros_like(scale)
        if ZERO in stored:
            zero = by_group(linear, ZERO, stored[ZERO].float(), groups)
        if not bool(torch.isfinite(zero).all()):
            raise linear.error(ZERO, "holds NaN or Inf: the checkpoint is damaged")
        zero = (zero + middle).t().contiguous()
        return AffineWeight(codes, self.bits, scale.t().contiguous(), zero, group_size)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Signed integers of 4 bits, two a byte and the first in the low half; W = scale · code + zero.  Int4Tensor."""

    group_size: int

    markers = (CODES,)
    label = "int4"

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n, c = linear.out_features, linear.in_features
        require_multiple(linear, "input features", c, self.group_size)
        groups = ExpectedTensor((c // self.group_size, n), FLOATS)
        return {CODES: ExpectedTensor((n, c // 2), ("I8", "U8")), SCALE: groups, ZERO: groups}

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> MinimumWeight:
        codes = unpack_codes(stored[CODES], 4) ^ MIDDLE  # signed values become codes from 0 on
        return _around_middle(linear, codes, stored[SCALE], stored[ZERO], self.group_size)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Codes of 4 bits as tinygemm's CUDA kernel reads them, scale and zero side by side.  Int4TilePackedTo4dTensor."""

    group_size: int

    markers = (CODES,)
    label = "int4"

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n = -(-linear.out_features // TILE_OUTPUTS)
        c = -(-linear.in_features // PADDED_INPUTS) * PADDED_INPUTS
        require_multiple(linear, "input features, padded,", c, self.group_size)
        return {
            CODES: ExpectedTensor((n, c // TILE_INPUTS, 32, 4), ("I32",)),
            SCALE_AND_ZERO: ExpectedTensor((c // self.group_size, n * TILE_OUTPUTS, 2), FLOATS),
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> MinimumWeight:
        n, c = linear.out_features, linear.in_features
        scale, zero = stored[SCALE_AND_ZERO][: group_count(linear, self.group_size), :n].unbind(-1)
        codes = _untiled(stored[CODES])[:n, :c].contiguous()
        return _around_middle(linear, codes, scale, zero, self.group_size, suffix=SCALE_AND_ZERO)


@dataclass(frozen=True, slots=True)
class Floats:
    """e4m3 with a scale for each row, or one alone.  Float8Tensor."""

    markers = (CODES,)
    label = "fp8"

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        shape = linear.out_features, linear.in_features
        return {CODES: ExpectedTensor(shape, ("F8_E4M3",)), SCALE: ExpectedTensor(None, FLOATS)}

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> Float8Weight:
        return float8_weight(linear, SCALE, stored[CODES], stored[SCALE], None)


def parse(fields: ConfigFields) -> QuantSpec:
    """Raises ModelError for what is not supported, naming the field."""
    kinds = fields.section("quant_type")
    config = None if kinds is None else kinds.section("default")
    if config is None:
        raise fields.error("quant_type", fields.raw().get("quant_type"), "an object with the configuration as default")
    if config.text("_type") not in BY_MODULE:
        spec = _layout(config)
        return ByModule(f"torchao-{spec.label}", spec)
    data = config.section("_data") or config
    modules = data.section("fqn_to_config") or data.section("module_fqn_to_config")
    if modules is None:
        raise data.error("fqn_to_config", None, "given, with a configuration for each module")
    return _by_module(modules)


BY_MODULE = ("FqnToConfig", "ModuleFqnToConfig")


def _by_module(modules: ConfigFields) -> ByModule:
    """None stands for a dense module."""
    sections = {name: section for name in modules.names() if (section := modules.section(name)) is not None}
    layouts = {name: _layout(section) for name, section in sections.items()}
    general = layouts.pop("_default", None)
    texts = {name: f"(?:{name.removeprefix('re:')})$" for name in layouts if name.startswith("re:")}
    patterns = tuple((pattern, layouts[name]) for name, pattern in read_patterns(modules, texts).items())
    names = {canonical_name(name).removesuffix(".weight"): spec for name, spec in layouts.items() if name[:3] != "re:"}
    return ByModule("torchao-mixed", general, names, patterns)


def _layout(config: ConfigFields) -> QuantSpec:
    kind = config.text("_type")
    if kind not in LAYOUTS:
        raise config.error("_type", kind, f"one of {', '.join((*LAYOUTS, *BY_MODULE))}")
    if config.integer("_version", 1) < 2:
        raise config.error("_version", config.integer("_version", 1), "2: save the model with a newer torchao")
    return LAYOUTS[kind](config.section("_data") or config)


def _int8(data: ConfigFields) -> QuantSpec:
    return Bytes(8, data.optional_integer("group_size"))


def _int4(data: ConfigFields) -> QuantSpec:
    packings: Mapping[str, Callable[[int], QuantSpec]] = {"plain": Pairs, "tile_packed_to_4d": Tiles}
    packing = _named(data, "int4_packing_format", "tile_packed_to_4d").lower()
    if packing not in packings:
        raise data.error("int4_packing_format", packing, f"one of {', '.join(packings)}")
    if data.integer("int4_tile_packed_ntile", TILE_OUTPUTS) != TILE_OUTPUTS:
        raise data.error("int4_tile_packed_ntile", data.integer("int4_tile_packed_ntile"), str(TILE_OUTPUTS))
    return packings[packing](data.integer("group_size", 128, minimum=2))


def _intx(data: ConfigFields) -> QuantSpec:
    bits = {f"int{bits}": bits for bits in (2, 3, 4, 5, 6, 8)}.get(_named(data, "weight_dtype", "int8"))
    if bits is None:
        raise data.error("weight_dtype", _named(data, "weight_dtype", "int8"), "int2 to int6, or int8")
    if _named(data, "intx_packing_format", "unpacked_to_int8").lower() != "unpacked_to_int8":
        raise data.error("intx_packing_format", _named(data, "intx_packing_format", ""), "unpacked_to_int8")
    name = "granularity" if data.has("granularity") else "weight_granularity"
    granularity = data.section(name)
    if granularity is None:
        return Bytes(bits, None)
    kind, inner = granularity.text("_type"), granularity.section("_data") or granularity
    if kind not in ("PerGroup", "PerAxis", "PerRow", "PerTensor") or inner.integer("axis", 0, minimum=0) != 0:
        raise data.error(name, kind, "PerGroup, or PerAxis of the first one")
    return Bytes(bits, inner.integer("group_size") if kind == "PerGroup" else None)


def _float8(data: ConfigFields) -> QuantSpec:
    dtype = _named(data, "weight_dtype", "float8_e4m3fn")
    if dtype != "float8_e4m3fn":
        raise data.error("weight_dtype", dtype, "float8_e4m3fn")
    if _named(data, "packing_format", "plain").lower() != "plain":
        raise data.error("packing_format", _named(data, "packing_format", ""), "plain")
    return Floats()


LAYOUTS: Mapping[str, Callable[[ConfigFields], QuantSpec]] = {
    "Int4WeightOnlyConfig": _int4,
    "Float8DynamicActivationInt4WeightConfig": _int4,
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8,
    "Int8StaticActivationInt8WeightConfig": _int8,
    "IntxWeightOnlyConfig": _intx,
    "Int8DynamicActivationIntxWeightConfig": _intx,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8,
}


def _named(data: ConfigFields, name: str, default: str) -> str:
    """A value that the file has as a text, or as {"_type": …, "_data": text}."""
    value = data.raw().get(name)
    return data.text(name, default) if not isinstance(value, dict) else ConfigFields(value, data.where).text("_data")


def _of_activations(*names: str) -> dict[str, ExpectedTensor]:
    return {f"._weight_act_quant_{name}": ExpectedTensor(None, (*FLOATS, "I8"), optional=True) for name in names}


def _around_middle(
    linear: LinearShape, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, suffix: str = SCALE
) -> MinimumWeight:
    """W = scale · (code − 8) + zero;  scale, zero: [G, N]"""
    scale = check_scales(linear, suffix, scale, zero_allowed=True).contiguous()
    minimum = MIDDLE * scale - zero.float()
    if not bool(torch.isfinite(minimum).all()):
        raise linear.error(suffix if suffix == SCALE_AND_ZERO else ZERO, "holds NaN or Inf: the checkpoint is damaged")
    return MinimumWeight(codes, 4, scale, minimum, min(group_size, linear.in_features))


def _untiled(words: Tensor) -> Tensor:
    """int32 [N / 8, C / 128, 32 lanes, 4] → uint8 [N, C].  A lane has an output, and pairs of inputs 8 apart."""
    outputs, inputs = words.shape[:2]
    fields = unpack_codes(words, 4).view(
        outputs, inputs, TILE_OUTPUTS, 4, 4, 2, 4
    )  # …, output, pair, word, odd, eighth
    return fields.permute(0, 2, 1, 4, 6, 3, 5).reshape(outputs * TILE_OUTPUTS, inputs * TILE_INPUTS)
