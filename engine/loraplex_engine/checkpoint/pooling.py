"""How a checkpoint's prompts are embedded, as sentence-transformers writes it beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import read_json, read_json_value
from loraplex_engine.link.pooling import STATES_NOTHING, ModelPooling, PoolingMethod

MODULES_FILE = "modules.json"
METHODS = {"lasttoken": PoolingMethod.LAST, "mean": PoolingMethod.MEAN}
_FLAG = "pooling_mode_"
_SPELLINGS = {"lasttoken": "lasttoken", "mean_tokens": "mean"}  # of the flags


def read_pooling(directory: Path) -> ModelPooling:
    """The pooling that the files of a model directory state. Raises ModelError for files that make no sense."""
    path = directory / MODULES_FILE
    if not path.exists():
        return STATES_NOTHING
    modules = read_json_value(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: must hold a list of modules, as sentence-transformers writes it")
    kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    normalize = "Normalize" in kinds
    if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        return ModelPooling(normalize=normalize, problem=f"{MODULES_FILE} has the module {unknown[0]}")
    if "Pooling" not in kinds:
        return ModelPooling(normalize=normalize, problem=f"{MODULES_FILE} has no module Pooling")
    file = directory / kinds["Pooling"] / "config.json"
    modes = _modes(read_json(file))
    if len(modes) == 1 and modes[0] in METHODS:
        return ModelPooling(METHODS[modes[0]], normalize)
    said = " and ".join(modes) or "nothing"
    return ModelPooling(normalize=normalize, problem=f"{file.parent.name}/{file.name} says to pool by {said}")


def _modes(config: Mapping[str, object]) -> list[str]:
    """The ways of pooling that the file asks for: in one field, or in a flag for each."""
    stated = config.get("pooling_mode")
    if isinstance(stated, str):
        return [stated]
    flags = [name.removeprefix(_FLAG) for name, value in config.items() if name.startswith(_FLAG) and value is True]
    return [_SPELLINGS.get(flag, flag) for flag in flags]
