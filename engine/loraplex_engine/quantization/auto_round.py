"""auto-round checkpoints (arXiv 2309.05516): files as others write them, under a name of their own for each layout."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import canonical_name
from loraplex_engine.quantization.awq import AwqSpec
from loraplex_engine.quantization.awq import parse as parse_awq
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout, Nvfp4Layout
from loraplex_engine.quantization.fp8 import Fp8Spec
from loraplex_engine.quantization.gptq import GptqSpec, read_parameters
from loraplex_engine.quantization.modules import ByModule, read_patterns
from loraplex_engine.quantization.spec import QuantSpec

logger = logging.getLogger(__name__)

METHOD = "auto-round"
PREFIX = "auto_round"
# What follows the prefix; old files name the kernels behind it, too: "auto_round:gptq:exllamav2".
WITH_OFFSET = ("auto_gptq", "gptq")  # zero points are stored less 1
WITHOUT_OFFSET = ("", "gptqmodel", "exllamav2", "tritonv2")
OF_AWQ = ("auto_awq", "awq")
OF_COMPRESSED_TENSORS = "llm_compressor"
STATIC_FLOAT8 = "fp8_static"
LAYOUTS = (*WITH_OFFSET, *WITHOUT_OFFSET[1:], *OF_AWQ, OF_COMPRESSED_TENSORS, STATIC_FLOAT8)
ROTATIONS = ("rotation_config", "spinquant_config")
UNQUANTISED_BITS = 16
MODULE_NAME = re.compile(r"[\w.]+")  # what else extra_config has are patterns


def parse(fields: ConfigFields) -> QuantSpec:
    """Raises ModelError for what is not supported, naming the field."""
    for name in ROTATIONS:
        if fields.filled_section(name) is not None:
            raise fields.error(name, "not empty", "absent: rotated weights are not supported")
    if fields.integer("act_bits", UNQUANTISED_BITS) < UNQUANTISED_BITS:
        logger.info("%s: activations stay unquantised; the file asks for quantised ones", fields.where)
    name = "packing_format" if fields.has("packing_format") else "backend"  # the second is what old versions wrote
    prefix, _, layout = fields.text(name, f"{PREFIX}:auto_gptq").partition(":")
    layout = layout.partition(":")[0]
    if prefix != PREFIX or layout not in (*LAYOUTS, ""):
        wanted = ", ".join((PREFIX, *(f"{PREFIX}:{each}" for each in LAYOUTS)))
        raise fields.error(name, fields.text(name), f"one of {wanted}")
    if layout == OF_COMPRESSED_TENSORS:
        return _by_module(fields, _small_float)
    if layout == STATIC_FLOAT8:
        return Fp8Spec(None, static_activations=True)
    if not fields.text("data_type", "int").startswith("int"):
        raise fields.error("data_type", fields.text("data_type"), f"int where {name} is {fields.text(name)}")
    if layout in OF_AWQ:
        return _by_module(fields, _of_awq)
    return _by_module(fields, partial(_of_gptq, zero_offset=1 if layout in WITH_OFFSET else 0))


def _of_gptq(fields: ConfigFields, zero_offset: int) -> GptqSpec:
    return GptqSpec(read_parameters(fields, None), (), zero_offset, zeros_borrow=False, method=METHOD)


def _of_awq(fields: ConfigFields) -> AwqSpec:
    return replace(parse_awq(fields), method=METHOD)


def _small_float(fields: ConfigFields) -> QuantSpec:
    kind, bits = fields.text("data_type"), fields.integer("bits")
    if kind.startswith("nv_fp") and bits == 4:
        return Nvfp4Layout(".weight_packed", ".weight_scale", ".weight_global_scale", whole_divides=True)
    if kind.startswith("mx_fp") and bits == 4:
        return Mxfp4Layout(".weight_packed", ".weight_scale")
    if kind.startswith("mx_fp") and bits == 8:
        return Fp8Spec((1, 32), static_activations=False)
    raise fields.error("data_type", f"{kind} of {bits} bits", "nv_fp of 4 bits, or mx_fp of 4 or 8")


def _by_module(fields: ConfigFields, read: Callable[[ConfigFields], QuantSpec]) -> QuantSpec:
    """With what `extra_config` changes for single modules. Those of 16 bits are left out: the tensors show that.

    Raises ModelError for a pattern that is none.
    """
    general, section = read(fields), fields.filled_section("extra_config")
    if section is None:
        return general
    specs = {}
    for name in section.names():
        changes = section.section(name)
        if changes is not None and changes.integer("bits", 1) < UNQUANTISED_BITS:
            specs[name] = read(changes.with_defaults(fields.raw()))
    names = {canonical_name(name): spec for name, spec in specs.items() if MODULE_NAME.fullmatch(name)}
    texts = {name: f".*(?:{name})" for name in specs if not MODULE_NAME.fullmatch(name)}  # which may match anywhere
    patterns = tuple((pattern, specs[name]) for name, pattern in read_patterns(section, texts).items())
    return ByModule(general.label, general, names, patterns) if specs else general
