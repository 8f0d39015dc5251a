"""ModelOpt checkpoints: floats of 8 and 4 bits, of one kind or of one for each module.

The quantisation is stated in config.json, or in a file of ModelOpt's own beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import canonical_name
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout, Nvfp4Layout
from loraplex_engine.quantization.fp8 import Fp8Spec
from loraplex_engine.quantization.modules import ByModule
from loraplex_engine.quantization.spec import QuantSpec

logger = logging.getLogger(__name__)

FLOAT8 = Fp8Spec(None, static_activations=True)
NVFP4 = Nvfp4Layout(".weight", ".weight_scale", ".weight_scale_2", whole_divides=False)
# Those that scale the inputs of linears, too (AWQ's and SmoothQuant's), are not among them.
ALGORITHMS: Mapping[str, QuantSpec] = {
    "FP8": FLOAT8,
    "FP8_PER_CHANNEL_PER_TOKEN": FLOAT8,
    "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "W4A8_NVFP4_FP8": NVFP4,
    "W4A8_MXFP4_FP8": Mxfp4Layout(".weight", ".weight_scale"),
    "MXFP8": Fp8Spec((1, 32), static_activations=False),
}
MIXED = "MIXED_PRECISION"


def parse(fields: ConfigFields) -> QuantSpec:
    """Raises ModelError for what is not supported, naming the field."""
    fields = fields.section("quantization") or fields  # as in ModelOpt's own file
    algorithm = fields.text("quant_algo")
    own = _of_modules(fields.section("quantized_layers")) if algorithm == MIXED else {}
    logger.info("%s: activations stay unquantised, whatever %s asks for", fields.where, algorithm)
    general = None if algorithm == MIXED else _layout(fields, (*ALGORITHMS, MIXED))
    label = MIXED if general is None else general.label
    return ByModule(f"modelopt-{label.lower().replace('_', '-')}", general, own)


def _of_modules(section: ConfigFields | None) -> dict[str, QuantSpec]:
    if section is None:
        return {}
    modules = {name: section.section(name) for name in section.names()}
    known = tuple(ALGORITHMS)
    return {canonical_name(name): _layout(module, known) for name, module in modules.items() if module is not None}


def _layout(fields: ConfigFields, known: tuple[str, ...]) -> QuantSpec:
    algorithm = fields.text("quant_algo")
    if algorithm not in ALGORITHMS:
        raise fields.error("quant_algo", algorithm, f"one of {', '.join(known)}")
    spec = ALGORITHMS[algorithm]
    if isinstance(spec, Nvfp4Layout | Mxfp4Layout) and fields.integer("group_size", spec.block) != spec.block:
        raise fields.error("group_size", fields.integer("group_size"), f"{spec.block} for {algorithm}")
    return spec
