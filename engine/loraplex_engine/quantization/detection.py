"""Detects a checkpoint's format from its files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import BASE_NAME, read_json
from loraplex_engine.quantization import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, mxfp4
from loraplex_engine.quantization.spec import QuantSpec

logger = logging.getLogger(__name__)

# A new format is one file, and one line here: its name in quant_method.
FORMATS: Mapping[str, Callable[[ConfigFields], QuantSpec]] = {
    "gptq": gptq.parse,
    "awq": awq.parse,
    "bitsandbytes": bitsandbytes.parse,
    "compressed-tensors": compressed_tensors.parse,
    "fp8": fp8.parse,
    "gguf": gguf.parse,
    "mxfp4": mxfp4.parse,
}
SECTIONS = ("quantization_config", "compression_config")  # of config.json; the second is an old spelling
# Files of their own, beside a config.json that says nothing: AutoGPTQ's and AutoAWQ's, and what they imply.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
MODELOPT_FILE = "hf_quant_config.json"
NAME_FIELD = "model_file_base_name"
COMPARED = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")


def read_spec(directory: Path, raw: Mapping[str, object]) -> QuantSpec | None:
    """The quantisation of the model in `directory`, whose config.json holds `raw`; None: it is not quantised.

    config.json counts where a file of the quantiser's own contradicts it. Raises ModelError naming the field that is
    not supported.
    """
    stated, own = _section(raw, str(directory / "config.json")), _own_file(directory)
    if stated is None:
        _check_modelopt(directory)
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
    if method not in FORMATS:
        raise fields.error("quant_method", method or None, f"one of {', '.join(FORMATS)}")
    return FORMATS[method](fields)


def _check_modelopt(directory: Path) -> None:
    """Raise ModelError if the model was quantised by ModelOpt, which states that only in a file of its own."""
    path = directory / MODELOPT_FILE
    if not path.exists():
        return
    section = ConfigFields(read_json(path), str(path)).section("quantization")
    algorithm = None if section is None else section.text_or_none("quant_algo")
    if algorithm is not None:
        raise ModelError(
            f"{path}: the model is quantised by ModelOpt ({algorithm}), whose format is not supported; the known ones "
            f"are {', '.join(FORMATS)}. Use one of them, or the unquantised model"
        )


def _own_file(directory: Path) -> ConfigFields | None:
    own = next((name for name in OWN_FILES if (directory / name).exists()), None)
    if own is None:
        return None
    fields = ConfigFields(read_json(directory / own), str(directory / own))
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
