"""GPTQ checkpoints (arXiv 2210.17323), as GPTQModel, AutoGPTQ and optimum write them.

qweight int32 [C·bits/32, N] and qzeros int32 [G, N·bits/32] hold codes from the lowest bit on, scales are [G, N], and
g_idx [C] names the group of each input feature. Format v1 stores zero − 1, v2 the zero itself.
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
from loraplex_engine.quantization.modules import read_patterns
from loraplex_engine.quantization.spec import LinearShape, check_scales, group_count, require_multiple
from loraplex_engine.quantization.unpacking import unpack_codes
from loraplex_kernels.quantized import AffineWeight

logger = logging.getLogger(__name__)

WORD_BITS = 32
BITS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of one module: `dynamic` may give single modules their own."""

    bits: int
    group_size: int  # -1: the whole column
    sym: bool

    def group(self, linear: LinearShape) -> int:
        return linear.in_features if self.group_size == -1 else min(self.group_size, linear.in_features)


@dataclass(frozen=True, slots=True)
class GptqSpec:
    parameters: Parameters
    dynamic: tuple[tuple[ModulePattern, Parameters], ...]  # the first that matches a module's path counts
    zero_offset: int  # what v1 took off the zeros
    # GPTQModel subtracts 1 from all zeros of a word at once, so that a zero of 0 borrows from its neighbour; adding it
    # back undoes that. AutoGPTQ adds to each code by itself.
    zeros_borrow: bool
    method: str = "gptq"  # whose files they are

    markers = (".qweight",)

    @property
    def label(self) -> str:
        group = "" if self.parameters.group_size == -1 else f"-g{self.parameters.group_size}"
        return f"{self.method}-{self.parameters.bits}bit{group}"

    def of(self, linear: LinearShape) -> Parameters:
        found = (parameters for pattern, parameters in self.dynamic if pattern.match(linear.path))
        return next(found, self.parameters)

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        parameters = self.of(linear)
        bits, groups = parameters.bits, group_count(linear, parameters.group(linear))
        n, c = linear.out_features, linear.in_features
        # 3-bit codes span words: three words are the least that holds whole codes.
        whole = WORD_BITS if bits == 3 else WORD_BITS // bits
        require_multiple(linear, "input features", c, whole)
        require_multiple(linear, "output features", n, whole)
        # Old writers add one of zeros to every linear.
        no_bias = {} if linear.has_bias else {".bias": ExpectedTensor((n,), FLOATS, optional=True)}
        return {
            ".qweight": ExpectedTensor((c * bits // WORD_BITS, n), ("I32",)),
            ".qzeros": ExpectedTensor((groups, n * bits // WORD_BITS), ("I32",)),
            ".scales": ExpectedTensor((groups, n), FLOATS),
            ".g_idx": ExpectedTensor((c,), ("I32", "I64"), optional=True),
            **no_bias,
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> AffineWeight:
        parameters = self.of(linear)
        bits, group_size = parameters.bits, parameters.group(linear)
        if ".bias" in stored and bool(stored[".bias"].any()):
            raise linear.error(".bias", "is not zero, and config.json says that the model has none")
        codes = unpack_codes(stored[".qweight"].t(), bits)
        order = _input_order(linear, stored.get(".g_idx"), group_size)
        return AffineWeight(
            codes=codes if order is None else codes[:, order],
            bits=bits,
            scale=check_scales(linear, ".scales", stored[".scales"]),
            zero=self._zeros(linear, stored[".qzeros"], parameters),
            group_size=group_size,
            input_order=order,
        )

    def _zeros(self, linear: LinearShape, words: Tensor, parameters: Parameters) -> Tensor:
        bits = parameters.bits
        highest = (1 << bits) - 1
        if self.zero_offset and self.zeros_borrow and bits != 3:  # its 3-bit zeros are shifted one by one
            ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
            zeros = unpack_codes((words.long() + ones).to(torch.int32), bits)
        else:
            stored = unpack_codes(words, bits)
            if self.zero_offset and not parameters.sym and bool((stored == highest).any()):
                logger.warning(
                    "%s.qzeros holds zero points of 0, stored as -1: some writers damage the zero points beside them, "
                    "so check the model's answers, or quantise it again",
                    linear.path,
                )
            zeros = (stored + self.zero_offset) & highest
        middle = 1 << (bits - 1)
        if parameters.sym and bool((zeros != middle).any()):
            raise linear.error(
                ".qzeros",
                f"holds other zero points than {middle}, and sym is true: sym or checkpoint_format is wrong",
            )
        return zeros.float()


def parse(fields: ConfigFields) -> GptqSpec:
    """Raises ModelError for what is not supported, naming the field."""
    name = "checkpoint_format" if fields.has("checkpoint_format") else "format"
    checkpoint_format = fields.text(name, "gptq")
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise fields.error(name, checkpoint_format, f"one of {', '.join(CHECKPOINT_FORMATS)}")
    if fields.flag("is_marlin_format"):
        raise fields.error("is_marlin_format", True, "false: save the model in the format gptq")
    if fields.text("pack_dtype", "int32") != "int32":
        raise fields.error("pack_dtype", fields.text("pack_dtype"), "int32")
    parameters = read_parameters(fields, None)
    meta = fields.section("meta")
    quantizers = meta.texts_or_text("quantizer") if meta is not None else ()
    return GptqSpec(
        parameters,
        _dynamic(fields.section("dynamic"), parameters),
        zero_offset=1 if checkpoint_format == "gptq" else 0,
        zeros_borrow=any(quantizer.startswith("gptqmodel") for quantizer in quantizers),
    )


def read_parameters(fields: ConfigFields, base: Parameters | None) -> Parameters:
    """Read the model's parameters (base None), or the changes that a `dynamic` entry makes to `base`."""
    bits = fields.integer("bits", None if base is None else base.bits)
    if bits not in BITS:
        raise fields.error("bits", bits, f"one of {', '.join(map(str, BITS))}")
    group_size = fields.integer("group_size", -1 if base is None else base.group_size, minimum=-1)
    if group_size == 0:
        raise fields.error("group_size", group_size, "positive, or -1 for whole columns")
    return Parameters(bits, group_size, fields.flag("sym", True if base is None else base.sym))


def _dynamic(section: ConfigFields | None, base: Parameters) -> tuple[tuple[ModulePattern, Parameters], ...]:
    """Read `dynamic`. Patterns with "-:" name dense modules and are skipped: the tensors show that they are dense."""
    if section is None:
        return ()
    texts = {name: name.removeprefix("+:") for name in section.names() if not name.startswith("-:")}
    changes = {name: section.section(name) for name in texts}
    return tuple(
        (pattern, base if (own := changes[name]) is None else read_parameters(own, base))
        for name, pattern in read_patterns(section, texts).items()
    )


def _input_order(linear: LinearShape, g_idx: Tensor | None, group_size: int) -> Tensor | None:
    """The order of input features that sorts them by group; None: they are sorted already."""
    if g_idx is None:
        return None
    groups = group_count(linear, group_size)
    if bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise linear.error(".g_idx", f"names groups outside 0 … {groups - 1}: the checkpoint is damaged")
    in_order = torch.arange(linear.in_features, device=g_idx.device) // group_size
    if torch.equal(g_idx.long(), in_order):
        return None
    sorted_groups, order = torch.sort(g_idx.long(), stable=True)
    if not torch.equal(sorted_groups, in_order):
        raise linear.error(".g_idx", f"does not divide the input features into groups of {group_size}")
    return order
