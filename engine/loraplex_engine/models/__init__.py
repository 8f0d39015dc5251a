"""The models: one shared decoder, and per family a thin file that says how its config.json describes one.

`load_model` turns a directory in Hugging Face layout into a `LanguageModel`, or into one rank's share of it. A new
family is a file here with a `FAMILY`, and a line in `registry`.
"""

from loraplex_engine.models.decoder import LanguageModel
from loraplex_engine.models.loading import load_model
from loraplex_engine.models.registry import parse_model_config, read_model_config

__all__ = ["LanguageModel", "load_model", "parse_model_config", "read_model_config"]
