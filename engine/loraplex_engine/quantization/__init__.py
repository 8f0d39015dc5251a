"""Quantised checkpoints: turns the format in config.json, and its packed tensors, into canonical records.

One file per format; `spec.py` says what a format has to offer, `detection.py` chooses it, `reader.py` reads a model's
linears by it, `cutting.py` cuts a rank's part out of one, `rounding.py` quantises a dense checkpoint while it is
loaded. Needs none of the packages that make such checkpoints.
"""

from loraplex_engine.quantization.cutting import cut
from loraplex_engine.quantization.detection import base_names, parse, read_spec
from loraplex_engine.quantization.reader import QuantizedReader
from loraplex_engine.quantization.rounding import round_to_nearest
from loraplex_engine.quantization.spec import LinearShape, QuantSpec

__all__ = ["LinearShape", "QuantSpec", "QuantizedReader", "base_names", "cut", "parse", "read_spec", "round_to_nearest"]
