"""HQQ checkpoints (half-quadratic quantisation) in safetensors, as hqq and transformers write them.

A matrix is a list of groups [N · G, group size], of whose codes a byte holds several: not neighbours, but those of as
many parts of the list. What hqq knows of a matrix are tensors beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.modules import ByModule
from loraplex_engine.quantization.spec import LinearShape, QuantSpec, check_scales, require_multiple
from loraplex_kernels.quantized import AffineWeight

CODES, SCALE, ZERO = ".W_q", ".scale", ".zero"
IN_A_WORD = {2: 4, 3: 10, 4: 2, 8: 1}  # codes, by their bits; those of 3 bits are in 32, others in 8
BESIDE = (
    *("shape", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype"),
    *("offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


@dataclass(frozen=True, slots=True)
class HqqSpec:
    bits: int
    group_size: int | None  # None: whole rows

    markers = (CODES,)

    @property
    def label(self) -> str:
        return f"hqq-{self.bits}bit" + ("" if self.group_size is None else f"-g{self.group_size}")

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n, c, size = linear.out_features, linear.in_features, self._group(linear)
        require_multiple(linear, "input features", c, size)
        groups, held = n * c // size, IN_A_WORD[self.bits]
        if groups % held and self.bits != 3:
            raise linear.error("", f"has {groups} groups, no multiple of {held}: its codes cannot be packed so")
        scales = ExpectedTensor((groups, 1), FLOATS)
        numbers = ("I32", "I64", "U8")
        return {
            CODES: ExpectedTensor((-(-groups // held), size), ("I32",) if self.bits == 3 else ("U8",)),
            SCALE: scales,
            ZERO: scales,
            **{f".{name}": ExpectedTensor((), numbers, optional=True) for name in ("nbits", "group_size", "axis")},
            **{f".{name}": ExpectedTensor(None, (*numbers, *FLOATS), optional=True) for name in BESIDE},
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> AffineWeight:
        n, size = linear.out_features, self._group(linear)
        for suffix, stated in ((".nbits", self.bits), (".group_size", size), (".axis", 1)):
            if suffix in stored and int(stored[suffix]) != stated:
                raise linear.error(suffix, f"is {int(stored[suffix])}, config.json makes it {stated}")
        scale = check_scales(linear, SCALE, stored[SCALE]).view(n, -1).t().contiguous()
        zero = stored[ZERO].float().view(n, -1).t().contiguous()
        if not bool(torch.isfinite(zero).all()):
            raise linear.error(ZERO, "holds NaN or Inf: the checkpoint is damaged")
        codes = _unpacked(stored[CODES], self.bits)[: n * linear.in_features // size]
        return AffineWeight(codes.reshape(n, linear.in_features), self.bits, scale, zero, size)

    def _group(self, linear: LinearShape) -> int:
        return self.group_size or linear.in_features


def parse(fields: ConfigFields) -> QuantSpec:
    """Raises ModelError for what is not supported, naming the field."""
    config = fields.section("quant_config")
    if config is None:
        raise fields.error("quant_config", None, "given, with how the weights are quantised")
    if config.has("weight_quant_params"):
        return _spec(config)
    sections = {name: section for name in config.names() if (section := config.section(name)) is not None}
    own = [(re.compile(rf"(?:.*\.)?{re.escape(name)}\Z"), _spec(section)) for name, section in sections.items()]
    return ByModule("hqq-mixed", None, patterns=tuple(own))


def _spec(config: ConfigFields) -> HqqSpec:
    """hqq nests a module's numbers in weight_quant_params; others of its objects are of scales and zeros."""
    for name in ("scale_quant_params", "zero_quant_params"):
        if config.filled_section(name) is not None:
            raise config.error(name, "not empty", "absent: quantised scales are not supported")
    weights = config.section("weight_quant_params") or config
    bits = weights.integer("nbits", 4)
    if bits not in IN_A_WORD:
        raise weights.error("nbits", bits, f"one of {', '.join(map(str, IN_A_WORD))}")
    if weights.integer("axis", 1, minimum=0) != 1:
        raise weights.error(
            "axis", 0, "1: groups across the outputs of a matrix have a scale for every weight of a row"
        )
    if weights.flag("view_as_float"):
        raise weights.error("view_as_float", True, "false: save the model so")
    return HqqSpec(bits, weights.optional_integer("group_size"))


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """uint8 or int32 [rows, columns] → uint8 [rows · codes of a word, columns], the first part from the high bits"""
    shifts = range(bits * (IN_A_WORD[bits] - 1), -1, -bits)
    return torch.cat([(words >> shift & (1 << bits) - 1).to(torch.uint8) for shift in shifts])
