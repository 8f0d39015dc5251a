"""auto-round checkpoints (arXiv 2309.05516): files as others write them, under a name of their own for each layout."""

from __future__ import annotations

import logging
import re

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import canonical_name
from loraplex_engine.quantization.awq import AwqSpec
from loraplex_engine.quantization.awq import parse as parse_awq
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout, Nvfp4Layout
from loraplex_engine.quantization.fp8 import Fp8Spec
from loraplex_engine.quantization.gptq import GptqSpec, read_parameters
from loraplex_engine.quantization.modules import ByModule
from loraplex_engine.quantization.spec import QuantSpec

logger = logging.getLogger(__name__)

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
        return _small_floats(fields)
    if layout == STATIC_FLOAT8:
        return Fp8Spec(None, static_activations=True)
    if not fields.text("data_type", "int").startswith("int"):
        raise fields.error("data_type", fields.text("data_type"), f"int where {name} is {fields.text(name)}")
    if layout in OF_AWQ:
        return _of_awq(fields)
    return _of_gptq(fields, zero_offset=1 if layout in WITH_OFFSET else 0)


def _of_gptq(fields: ConfigFields, zero_offset: int) -> GptqSpec:
    parameters = read_parameters(fields, None)
    own = tuple((pattern, read_parameters(changes, parameters)) for pattern, changes in _exceptions(fields))
    return GptqSpec(parameters, own, zero_offset, zeros_borrow=False, method="auto-round")


def _of_awq(fields: ConfigFields) -> ByModule | AwqSpec:
    general = parse_awq(fields)
    own = [(pattern, parse_awq(fields.changed_by(changes))) for pattern, changes in _exceptions(fields)]
    spec = AwqSpec(general.version, general.group_size, method="auto-round")
    return ByModule(spec.label, spec, tuple(own)) if own else spec


def _small_floats(fields: ConfigFields) -> ByModule:
    spec = _small_float(fields)
    own = tuple((pattern, _small_float(fields.changed_by(changes))) for pattern, changes in _exceptions(fields))
    return ByModule(f"auto-round-{spec.label}", spec, own)


def _small_float(fields: ConfigFields) -> QuantSpec:
    kind, bits = fields.text("data_type"), fields.integer("bits")
    if kind.startswith("nv_fp") and bits == 4:
        return Nvfp4Layout(".weight_packed", ".weight_scale", ".weight_global_scale", whole_divides=True)
    if kind.startswith("mx_fp") and bits == 4:
        return Mxfp4Layout(".weight_packed", ".weight_scale")
    if kind.startswith("mx_fp") and bits == 8:
        return Fp8Spec((1, 32), static_activations=False)
    raise fields.error("data_type", f"{kind} of {bits} bits", "nv_fp of 4 bits, or mx_fp of 4 or 8")


def _exceptions(fields: ConfigFields) -> list[tuple[re.Pattern[str], ConfigFields]]:
    """What `extra_config` changes for single modules, names before patterns. Those of 16 bits are left out: the tensors
    show that they are dense."""
    section = fields.section("extra_config")
    found: list[tuple[bool, re.Pattern[str], ConfigFields]] = []
    for name in section.names() if section is not None else ():
        assert section is not None
        changes = section.section(name)
        if changes is None or changes.integer("bits", 1) >= UNQUANTISED_BITS:
            continue
        is_name = re.fullmatch(r"[\w.]+", name) is not None
        try:
            pattern = re.compile(re.escape(canonical_name(name)) + r"\Z" if is_name else f".*?(?:{name})")
        except re.error as error:
            raise section.error(name, f"{name!r} ({error})", "a regular expression of module names") from None
        found.append((not is_name, pattern, changes))
    return [(pattern, changes) for _, pattern, changes in sorted(found, key=lambda each: each[0])]
