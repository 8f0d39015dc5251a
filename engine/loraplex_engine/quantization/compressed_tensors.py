"""compressed-tensors checkpoints, as llm-compressor writes them: integers, packed or not, and float8.

Only weights are read as quantised. If the file also asks for quantised activations, these stay unquantised, which is
nearer to the unquantised model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.fp8 import float8_weight, read_block
from loraplex_engine.quantization.spec import LinearShape, check_scales, group_count
from loraplex_engine.quantization.unpacking import unpack_codes
from loraplex_kernels.quantized import AffineWeight, QuantizedWeight

logger = logging.getLogger(__name__)

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
STRATEGIES = ("tensor", "channel", "group", "block")
PACKED_BITS = (2, 4, 8)  # codes that never span a word: old and new versions of the package pack 3 bits differently
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Scheme:
    """The storage of the modules of one `config_groups` entry."""

    targets: tuple[str, ...]  # "Linear", a module's path, or "re:" and a pattern of paths
    packed: bool
    bits: int
    kind: str  # "int", "float"
    symmetric: bool
    group_size: int | None  # None: the whole row
    block: tuple[int, int] | None
    per_tensor: bool
    activations: bool  # quantised ones: scales of theirs may be stored

    def matches(self, path: str) -> bool:
        return any(
            re.match(target.removeprefix("re:"), path) is not None
            if target.startswith("re:")
            else target in (path, path.rpartition(".")[2])
            for target in self.targets
        )


@dataclass(frozen=True, slots=True)
class CompressedTensorsSpec:
    schemes: tuple[Scheme, ...]

    markers = (".weight_packed", ".weight_scale")

    @property
    def label(self) -> str:
        scheme = self.schemes[0]
        return "compressed-tensors-" + ("fp8" if scheme.kind == "float" else f"int{scheme.bits}")

    def of(self, linear: LinearShape) -> Scheme:
        """The entry that names the module, or else all linears."""
        named = [scheme for scheme in self.schemes if scheme.matches(linear.path)]
        general = [scheme for scheme in self.schemes if "Linear" in scheme.targets]
        if not (named or general):
            raise linear.error("", "is quantised, and no entry of config_groups in config.json targets it")
        return (named or general)[0]

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        scheme, n, c = self.of(linear), linear.out_features, linear.in_features
        found: dict[str, ExpectedTensor] = {".weight_scale": ExpectedTensor(_scale_shape(scheme, linear), FLOATS)}
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
        if scheme.activations:
            found |= {
                name: ExpectedTensor(None, (*FLOATS, "I8", "F8_E4M3"), optional=True)
                for name in (".input_scale", ".input_zero_point")
            }
        return found

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.of(linear)
        if scheme.kind == "float":
            return float8_weight(linear, ".weight_scale", stored[".weight"], stored[".weight_scale"], scheme.block)
        n, c = linear.out_features, linear.in_features
        if ".weight_shape" in stored and stored[".weight_shape"].tolist() != [n, c]:
            raise linear.error(".weight_shape", f"is {stored['.weight_shape'].tolist()}, config.json makes it {[n, c]}")
        offset = 1 << (scheme.bits - 1)  # signed values become codes from 0 on
        codes = (
            unpack_codes(stored[".weight_packed"], scheme.bits)[:, :c].contiguous()
            if scheme.packed
            else stored[".weight"].view(torch.uint8) ^ offset
        )
        groups = _groups(scheme, linear)
        scale = check_scales(linear, ".weight_scale", stored[".weight_scale"]).reshape(-1, groups).expand(n, groups)
        zero = torch.full_like(scale, offset)
        if scheme.symmetric:
            if ".weight_zero_point" in stored and bool(stored[".weight_zero_point"].any()):
                raise linear.error(".weight_zero_point", "is not zero, though config.json says symmetric")
        elif scheme.packed:
            zero = unpack_codes(stored[".weight_zero_point"].t(), scheme.bits)[:, :n].t().float()
        else:
            zero = zero + stored[".weight_zero_point"].float().reshape(-1, groups)
        group_size = scheme.group_size or c
        return AffineWeight(codes, scheme.bits, scale.t().contiguous(), zero.t().contiguous(), group_size)


def parse(fields: ConfigFields) -> CompressedTensorsSpec:
    """Raises ModelError for what is not supported, naming the field."""
    file_format = fields.text("format", "dense")
    for name in ("sparsity_config", "transform_config", "kv_cache_scheme"):
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
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    packed = name == "pack-quantized"
    if kind not in ("int", "float") or (kind == "float" and (packed or bits != 8)):
        raise weights.error("type", f"{kind} of {bits} bits", "int, or float of 8 bits")
    widths = PACKED_BITS if packed else (8,)
    if kind == "int" and bits not in widths:
        raise weights.error("num_bits", bits, f"{' or '.join(map(str, widths))} where the format is {name}")
    group_size = weights.optional_group("group_size")
    strategy = weights.text("strategy", "tensor" if group_size is None else "group")
    block = read_block(weights, "block_structure") if strategy == "block" else None
    if strategy not in STRATEGIES or (strategy == "block") != (block is not None):
        raise weights.error("strategy", strategy, f"one of {', '.join(STRATEGIES)}, with a block_structure for block")
    if strategy == "group" and group_size is None:
        raise weights.error("group_size", None, "given for groups")
    if (kind == "float" and strategy == "group") or (kind == "int" and strategy == "block"):
        raise weights.error("strategy", strategy, f"another one for weights of type {kind}")
    if weights.text("actorder", "weight") not in ("weight", "static"):
        raise weights.error("actorder", weights.text("actorder"), "weight: grouping by activations is not supported")
    if weights.flag("dynamic"):
        raise weights.error("dynamic", True, "false for weights")
    activations = group.section("input_activations") is not None
    if activations:
        logger.info("%s: activations stay unquantised; the file asks for quantised ones", group.where)
    targets = group.texts("targets")
    _check_patterns(group, targets)
    return Scheme(
        targets,
        packed,
        bits,
        kind,
        weights.flag("symmetric", default=True),
        group_size if strategy == "group" else None,
        block,
        strategy == "tensor",
        activations,
    )


def _check_patterns(group: ConfigFields, targets: tuple[str, ...]) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise ModelError(f"{group.where}: targets: {target!r} is no regular expression: {error}") from None


def _groups(scheme: Scheme, linear: LinearShape) -> int:
    return 1 if scheme.group_size is None else group_count(linear, scheme.group_size)


def _scale_shape(scheme: Scheme, linear: LinearShape) -> tuple[int, ...] | None:
    if scheme.per_tensor:
        return None  # () or (1,)
    if scheme.block is not None:
        rows, columns = scheme.block
        return -(-linear.out_features // rows), -(-linear.in_features // columns)
    return linear.out_features, _groups(scheme, linear)
