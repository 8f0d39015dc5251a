"""compressed-tensors checkpoints, as llm-compressor writes them: integers, packed or not, and floats of 8 and 4 bits.

Where the file asks for it, activations are rounded to int8 beside int8 weights. Others stay unquantised, which is
nearer to the unquantised model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_adapters.files.pattern import ModulePattern
from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout, Nvfp4Layout
from loraplex_engine.quantization.fp8 import float8_weight, read_block
from loraplex_engine.quantization.integers import IntegerInputs, integer_weight
from loraplex_engine.quantization.modules import read_patterns
from loraplex_engine.quantization.spec import SCALE_TYPES, LinearShape, by_group, check_scales, group_count
from loraplex_engine.quantization.unpacking import unpack_codes
from loraplex_kernels.quantized import AffineWeight, QuantizedWeight

logger = logging.getLogger(__name__)

FLOATS_OF_4_BITS: Mapping[str, Mxfp4Layout | Nvfp4Layout] = {
    "nvfp4-pack-quantized": Nvfp4Layout(".weight_packed", ".weight_scale", ".weight_global_scale", whole_divides=True),
    "mxfp4-pack-quantized": Mxfp4Layout(".weight_packed", ".weight_scale"),
}
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "mxfp8-quantized",
    *FLOATS_OF_4_BITS,
)
OF_INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".input_global_scale")
STRATEGIES = ("tensor", "channel", "group", "block")
INT_BITS = (4, 8)  # in a byte each
PACKED_BITS = (2, 4, 8)  # codes that never span a word: old and new versions of the package pack 3 bits differently
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Scheme:
    """The storage of the modules of one `config_groups` entry."""

    targets: frozenset[str]  # "Linear", or a module's path or the end of one
    patterns: tuple[ModulePattern, ...]  # of paths
    packed: bool
    bits: int
    kind: str  # "int", "float"
    symmetric: bool
    group_size: int | None  # None: the whole row
    block: tuple[int, int] | None
    per_tensor: bool
    activations: bool  # quantised ones: scales of theirs may be stored
    small: Mxfp4Layout | Nvfp4Layout | None = None  # floats of 4 bits, which are laid out so
    integer_inputs: IntegerInputs | None = None  # None: activations stay unquantised

    def matches(self, path: str) -> bool:
        named = not self.targets.isdisjoint((path, path.rpartition(".")[2]))
        return named or any(pattern.match(path) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class CompressedTensorsSpec:
    schemes: tuple[Scheme, ...]

    markers = (".weight_packed", ".weight_scale")

    @property
    def label(self) -> str:
        scheme = self.schemes[0]
        if scheme.small is not None:
            return f"compressed-tensors-{scheme.small.label}"
        if scheme.integer_inputs is not None:
            return "compressed-tensors-w8a8"
        return "compressed-tensors-" + ("fp8" if scheme.kind == "float" else f"int{scheme.bits}")

    def of(self, linear: LinearShape) -> Scheme:
        """The entry that names the module, or else all linears."""
        named = [scheme for scheme in self.schemes if scheme.matches(linear.path)]
        general = [scheme for scheme in self.schemes if "Linear" in scheme.targets]
        if not (named or general):
            raise linear.error("", "is quantised, and no entry of config_groups in config.json targets it")
        return (named or general)[0]

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        scheme = self.of(linear)
        found = _stored(scheme, linear) if scheme.small is None else scheme.small.tensors(linear)
        if scheme.integer_inputs is not None:
            found |= scheme.integer_inputs.tensors()
        elif scheme.activations:
            found |= {name: ExpectedTensor(None, (*FLOATS, "I8", "F8_E4M3"), optional=True) for name in OF_ACTIVATIONS}
        return found

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.of(linear)
        if scheme.small is not None:
            return scheme.small.read(linear, stored)
        if scheme.kind == "float":
            block = scheme.block or (None if scheme.group_size is None else (1, scheme.group_size))
            return float8_weight(linear, ".weight_scale", stored[".weight"], stored[".weight_scale"], block)
        if scheme.symmetric and ".weight_zero_point" in stored and bool(stored[".weight_zero_point"].any()):
            raise linear.error(".weight_zero_point", "is not zero, though config.json says symmetric")
        if scheme.integer_inputs is not None:
            inputs = scheme.integer_inputs.read(linear, stored)
            return integer_weight(linear, ".weight_scale", stored[".weight"], stored[".weight_scale"], inputs)
        return _integers(scheme, linear, stored)


def _stored(scheme: Scheme, linear: LinearShape) -> dict[str, ExpectedTensor]:
    n, c = linear.out_features, linear.in_features
    scales = SCALE_TYPES if scheme.kind == "float" else FLOATS
    found = {".weight_scale": ExpectedTensor(_scale_shape(scheme, linear), scales)}
    if scheme.packed:
        found[".weight_packed"] = ExpectedTensor((n, -(-c * scheme.bits // WORD_BITS)), ("I32",))
        found[".weight_shape"] = ExpectedTensor((2,), ("I64", "I32"), optional=True)
    else:
        found[".weight"] = ExpectedTensor((n, c), ("F8_E4M3",) if scheme.kind == "float" else ("I8",))
    if scheme.symmetric or scheme.kind == "float":
        found[".weight_zero_point"] = ExpectedTensor(None, ("I8", "I32", "F8_E4M3"), optional=True)
    elif scheme.packed:
        rows = -(-n * scheme.bits // WORD_BITS)
        found[".weight_zero_point"] = ExpectedTensor((rows, _groups(scheme, linear)), ("I32",))
    else:
        found[".weight_zero_point"] = ExpectedTensor(_scale_shape(scheme, linear), ("I8",))
    return found


def _integers(scheme: Scheme, linear: LinearShape, stored: Mapping[str, Tensor]) -> AffineWeight:
    n, c = linear.out_features, linear.in_features
    if ".weight_shape" in stored and stored[".weight_shape"].tolist() != [n, c]:
        raise linear.error(".weight_shape", f"is {stored['.weight_shape'].tolist()}, config.json makes it {[n, c]}")
    offset = 1 << (scheme.bits - 1)  # signed values become codes from 0 on
    codes = (
        unpack_codes(stored[".weight_packed"], scheme.bits)[:, :c].contiguous()
        if scheme.packed
        else stored[".weight"].view(torch.uint8) + offset
    )
    if int(codes.max()) >= 2 * offset:
        raise linear.error(".weight", f"holds values outside {-offset} … {offset - 1}, the range of {scheme.bits} bits")
    groups = _groups(scheme, linear)
    scale = check_scales(linear, ".weight_scale", stored[".weight_scale"])
    scale = by_group(linear, ".weight_scale", scale, groups)
    zero = torch.full_like(scale, offset)
    if scheme.packed and not scheme.symmetric:
        zero = unpack_codes(stored[".weight_zero_point"].t(), scheme.bits)[:, :n].t().float()
    elif not scheme.symmetric:
        zero = zero + by_group(linear, ".weight_zero_point", stored[".weight_zero_point"].float(), groups)
    group_size = min(scheme.group_size or c, c)
    return AffineWeight(codes, scheme.bits, scale.t().contiguous(), zero.t().contiguous(), group_size)


def parse(fields: ConfigFields) -> CompressedTensorsSpec:
    """Raises ModelError for what is not supported, naming the field."""
    file_format = fields.text("format", "dense")
    for name in ("sparsity_config", "transform_config"):
        section = fields.section(name)
        if section is not None and section.names() and section.text_or_none("format") != "dense":
            raise fields.error(name, "not empty", "absent: it is not supported")
    groups = fields.section("config_groups")
    if groups is None or not groups.names():
        raise fields.error("config_groups", None, "given, with how the weights are quantised")
    sections = [section for name in groups.names() if (section := groups.section(name)) is not None]
    return CompressedTensorsSpec(tuple(_scheme(section, file_format) for section in sections))


def _scheme(group: ConfigFields, file_format: str) -> Scheme:
    name = group.text("format", file_format)
    if name not in FORMATS:
        raise group.error("format", name, f"one of {', '.join(FORMATS)}")
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", None, "given: a file that quantises activations alone is not supported")
    bits, kind, small = weights.integer("num_bits", 8), weights.text("type", "int"), FLOATS_OF_4_BITS.get(name)
    packed = name == "pack-quantized"
    if kind not in ("int", "float") or (kind == "float" and (packed or bits != (8 if small is None else 4))):
        raise weights.error("type", f"{kind} of {bits} bits", "int, or float of 8 bits; of 4 in nvfp4 and mxfp4")
    widths = PACKED_BITS if packed else INT_BITS
    if kind == "int" and (bits not in widths or name not in OF_INTEGERS):
        raise weights.error("num_bits", bits, f"{' or '.join(map(str, widths))} where the format is {name}")
    group_size = weights.optional_group("group_size")
    strategy, block = _strategy(weights, kind, group_size, small)
    if weights.text("actorder", "weight") not in ("weight", "static"):
        raise weights.error("actorder", weights.text("actorder"), "weight: grouping by activations is not supported")
    if weights.flag("dynamic"):
        raise weights.error("dynamic", True, "false for weights")
    activations, symmetric = group.section("input_activations"), weights.flag("symmetric", default=True)
    of_bytes = kind == "int" and bits == 8 and not packed and symmetric and strategy in ("tensor", "channel")
    inputs = _integer_inputs(activations) if activations is not None and of_bytes else None
    if activations is not None and inputs is None:
        logger.info("%s: activations stay unquantised; the file asks for quantised ones", group.where)
    targets = group.texts("targets")
    texts = {target: target.removeprefix("re:") for target in targets if target.startswith("re:")}
    return Scheme(
        frozenset(targets) - texts.keys(),
        tuple(read_patterns(group, texts).values()),
        packed,
        bits,
        kind,
        symmetric,
        group_size if strategy == "group" else None,
        block,
        strategy == "tensor",
        activations is not None,
        small,
        inputs,
    )


def _integer_inputs(activations: ConfigFields) -> IntegerInputs | None:
    """How activations are rounded beside weights of int8. None: they stay as they are."""
    if (activations.text("type", "int"), activations.integer("num_bits", 8)) != ("int", 8):
        return None
    dynamic = activations.flag("dynamic")
    if activations.text("strategy", "tensor") != ("token" if dynamic else "tensor"):
        return None
    return IntegerInputs(activations.flag("symmetric", default=True), static=not dynamic)


def _strategy(
    weights: ConfigFields, kind: str, group_size: int | None, small: Mxfp4Layout | Nvfp4Layout | None
) -> tuple[str, tuple[int, int] | None]:
    """What shares a scale, and the rows and columns of it if they are blocks."""
    strategy = weights.text("strategy", "tensor" if group_size is None else "group")
    if small is not None:
        known = strategy in ("group", "tensor_group") and weights.flag("symmetric", True)
        if group_size != small.block or not known:
            raise weights.error("group_size", group_size, f"{small.block}, symmetric, for {small.label}")
        return "group", None
    block = read_block(weights, "block_structure") if strategy == "block" else None
    if strategy not in STRATEGIES or (strategy == "block") != (block is not None):
        raise weights.error("strategy", strategy, f"one of {', '.join(STRATEGIES)}, with a block_structure for block")
    if strategy == "group" and group_size is None:
        raise weights.error("group_size", None, "given for groups")
    if kind == "int" and strategy == "block":
        raise weights.error("strategy", strategy, "another one for integers")
    return strategy, block


def _groups(scheme: Scheme, linear: LinearShape) -> int:
    return 1 if scheme.group_size is None else group_count(linear, scheme.group_size)


def _scale_shape(scheme: Scheme, linear: LinearShape) -> tuple[int, ...] | None:
    if scheme.per_tensor:
        return None  # () or (1,)
    if scheme.block is not None:
        rows, columns = scheme.block
        return -(-linear.out_features // rows), -(-linear.in_features // columns)
    return linear.out_features, _groups(scheme, linear)
