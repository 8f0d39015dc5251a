"""MXFP4 as gpt-oss has it: the matrices of all experts, in blocks of 32 floats of 4 bits with an exponent each."""

from __future__ import annotations

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout


def parse(fields: ConfigFields) -> Mxfp4Layout:
    return Mxfp4Layout("_blocks", "_scales", by_block=True)
