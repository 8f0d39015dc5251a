"""Reads what a model is from its files, whatever form they have."""

from __future__ import annotations

from pathlib import Path

from loraplex_engine.checkpoint.gguf_config import read_gguf_config
from loraplex_engine.checkpoint.weights import read_json


def read_config(path: Path) -> dict[str, object]:
    """The content of config.json in a model directory, or what it would be for a GGUF file.

    Raises ModelError if there is none, or it makes no sense.
    """
    return read_gguf_config(path) if path.is_file() else read_json(config_file(path))


def config_file(path: Path) -> Path:
    """The file that states it, for errors."""
    return path if path.is_file() else path / "config.json"
