"""Quark checkpoints, as AMD publishes them: float8, and MXFP4."""

from __future__ import annotations

import fnmatch
import logging
import re

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import canonical_name
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout
from loraplex_engine.quantization.fp8 import Fp8Spec
from loraplex_engine.quantization.modules import ByModule
from loraplex_engine.quantization.spec import QuantSpec

logger = logging.getLogger(__name__)

FLOAT8 = Fp8Spec(None, static_activations=True)
MXFP4 = Mxfp4Layout(".weight", ".weight_scale")
IN_WEIGHTS = ("smooth", "autosmoothquant", "awq", "gptq", "gptaq", "autoround", "qronos")  # whose work is all there
WILD = re.compile(r"[*?\[]")  # in a pattern of paths, which `fnmatch` matches without trying again and again
AXES = {"per_channel": 0, "per_group": 1}  # of a weight: its output features, and its input features
WHOLE = ("per_tensor", "per_channel")


def parse(fields: ConfigFields) -> QuantSpec:
    """Raises ModelError for what is not supported, naming the field."""
    export, everything = fields.section("export"), fields.section("global_quant_config")
    if export is not None and export.text("weight_format", "real_quantized") != "real_quantized":
        raise export.error(
            "weight_format", export.text("weight_format"), "real_quantized: others hold unquantised weights"
        )
    if fields.filled_section("layer_type_quant_config") is not None:
        raise fields.error("layer_type_quant_config", "not empty", "absent: it is not supported")
    _check_algorithms(fields)
    logger.info("%s: activations stay unquantised, whatever the file asks for", fields.where)
    general = None if everything is None else _layout(everything)
    layers = fields.section("layer_quant_config")
    own = {} if layers is None else _of_layers(layers)
    if general is None and not own:
        raise fields.error("global_quant_config", None, "given, with how the weights are quantised")
    names = {canonical_name(name): spec for name, spec in own.items() if not WILD.search(name)}
    patterns = tuple((re.compile(fnmatch.translate(name)), spec) for name, spec in own.items() if WILD.search(name))
    return ByModule(f"quark-{(general or next(iter(own.values()))).label}", general, names, patterns)


def _of_layers(layers: ConfigFields) -> dict[str, QuantSpec]:
    sections = {name: section for name in layers.names() if (section := layers.section(name)) is not None}
    return {name: spec for name, section in sections.items() if (spec := _layout(section)) is not None}


def _check_algorithms(fields: ConfigFields) -> None:
    """Raise ModelError for those that leave more behind than other weights: turned inputs, a product beside."""
    stated = fields.raw().get("algo_config")
    for each in stated if isinstance(stated, list) else [stated]:
        name = each.get("name") if isinstance(each, dict) else each
        if name is not None and name not in IN_WEIGHTS:
            raise fields.error("algo_config", name, f"one of {', '.join(IN_WEIGHTS)}")


def _layout(config: ConfigFields) -> QuantSpec | None:
    """None: these modules' weights are not quantised."""
    weight = config.section("weight")
    if weight is None:
        return None
    dtype, scheme = weight.text("dtype"), weight.text("qscheme", "per_tensor")
    axis = weight.integer("ch_axis", AXES.get(scheme, 0), minimum=-2)
    if scheme in AXES and axis not in (AXES[scheme], AXES[scheme] - 2):
        raise weight.error("ch_axis", axis, f"{AXES[scheme]} where qscheme is {scheme}")
    if dtype == "fp8_e4m3" and scheme in WHOLE:
        return FLOAT8
    exponents = weight.text("scale_format", "") == "e8m0"
    if dtype == "fp4" and scheme == "per_group" and exponents and weight.integer("group_size") == MXFP4.block:
        return MXFP4
    wanted = f"fp8_e4m3 per_tensor or per_channel, or fp4 per_group of {MXFP4.block} with scales in e8m0"
    raise weight.error("dtype", f"{dtype} {scheme}", wanted)
