"""Detects a checkpoint's format from its files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import BASE_NAME, read_json
from loraplex_engine.quantization import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    hqq,
    modelopt,
    mxfp4,
    quark,
    torchao,
    w8a8,
)
from loraplex_engine.quantization.spec import QuantSpec

logger = logging.getLogger(__name__)

# A new format is one file, and one line here: its name in quant_method.
FORMATS: Mapping[str, Callable[[ConfigFields], QuantSpec]] = {
    "gptq": gptq.parse,
    "awq": awq.parse,
    "bitsandbytes": bitsandbytes.parse,
    "compressed-tensors": compressed_tensors.parse,
    "auto-round": auto_round.parse,
    "modelopt": modelopt.parse,
    "quark": quark.parse,
    "torchao": torchao.parse,
    "hqq": hqq.parse,
    "fp8": fp8.parse,
    "mxfp8": fp8.parse_mxfp8,
    "gguf": gguf.parse,
    "mxfp4": mxfp4.parse,
    "smooth_quant": w8a8.parse_smooth_quant,
    "w8a8_int8": w8a8.parse_w8a8_int8,
}
SECTIONS = ("quantization_config", "compression_config")  # of config.json; the second is an old spelling
# Other names of formats: old ones, those that vLLM tells ModelOpt's kinds apart by, and Meta's of float8 by rows.
OTHER_NAMES = {
    "intel/auto-round": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_mxfp8": "modelopt",
    "fbgemm_fp8": "fp8",
}
MODELOPT_FILE = "hf_quant_config.json"
# Files of their own, beside a config.json that says nothing: AutoGPTQ's, AutoAWQ's and ModelOpt's, and what they imply.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", MODELOPT_FILE: "modelopt"}
CACHE_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")
NAME_FIELD = "model_file_base_name"
COMPARED = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")


def read_spec(directory: Path, raw: Mapping[str, object]) -> QuantSpec | None:
    """The quantisation of the model in `directory`, whose config.json holds `raw`; None: it is not quantised.

    config.json counts where a file of the quantiser's own contradicts it. Raises ModelError naming the field that is
    not supported.
    """
    stated, own = _section(raw, str(directory / "config.json")), _own_file(directory)
    if stated is None:
        return None if own is None else parse(own)
    if own is not None:
        both = [name for name in COMPARED if own.has(name) and stated.has(name)]
        differing = [name for name in both if not own.agrees(stated, name)]
        if differing:
            logger.warning("%s contradicts config.json in %s: config.json counts", own.where, ", ".join(differing))
    return parse(stated)


def base_names(directory: Path, raw: Mapping[str, object]) -> list[str]:
    """The possible base names of the model's files in `directory`: AutoGPTQ states one, or takes a name
    of its own if it states none.

    raw: the content of config.json. Raises ModelError for a name that leads out of the directory.
    """
    names = [BASE_NAME]
    for fields in (_section(raw, str(directory / "config.json")), _own_file(directory)):
        if fields is None or fields.text("quant_method", "") != "gptq":
            continue
        if fields.has(NAME_FIELD):
            names.insert(0, fields.text(NAME_FIELD))
        elif fields.has("bits"):
            names.insert(0, f"gptq_model-{fields.integer('bits')}bit-{fields.integer('group_size', -1, minimum=-1)}g")
        if Path(names[0]).name != names[0]:
            raise fields.error(NAME_FIELD, names[0], "the name of a file beside it")
    return list(dict.fromkeys(names))


def parse(fields: ConfigFields) -> QuantSpec:
    """The format that a quantization_config states. Raises ModelError if it is not supported, naming the field."""
    method = fields.text("quant_method", _method_of_old_files(fields))
    method = OTHER_NAMES.get(method, method)
    if method not in FORMATS:
        raise fields.error("quant_method", method or None, f"one of {', '.join(FORMATS)}")
    if any(fields.has(name) for name in CACHE_FIELDS):
        logger.info(
            "%s: asks for a quantised cache of keys and values: kv_cache_dtype alone decides here", fields.where
        )
    return FORMATS[method](fields)


def _own_file(directory: Path) -> ConfigFields | None:
    own = next((name for name in OWN_FILES if (directory / name).exists()), None)
    if own is None:
        return None
    fields = ConfigFields(read_json(directory / own), str(directory / own))
    if own == MODELOPT_FILE:
        found = fields.section("quantization")
        if found is None or not found.has("quant_algo"):
            return None  # quantised nothing
        fields = found
    return fields.with_defaults({"quant_method": OWN_FILES[own]})


def _section(raw: Mapping[str, object], where: str) -> ConfigFields | None:
    """The quantization_config of config.json or of a multimodal file's text model; None: absent or empty."""
    fields = ConfigFields(raw, where)
    for place in (fields, fields.section("text_config")):
        for name in SECTIONS:
            section = None if place is None else place.section(name)
            if section is not None and section.names():
                return section
    return None


def _method_of_old_files(fields: ConfigFields) -> str:
    """The method of a file without `quant_method`, which old versions of transformers did not write."""
    return "bitsandbytes" if fields.has("load_in_4bit") or fields.has("load_in_8bit") else ""
