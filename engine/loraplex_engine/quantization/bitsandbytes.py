"""bitsandbytes checkpoints: nf4 and fp4 (QLoRA, arXiv 2305.14314) and int8 (LLM.int8(), arXiv 2208.07339)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, QuantSpec, check_scales
from loraplex_engine.quantization.unpacking import unpack_codes
from loraplex_kernels.quantized import TABLE_SIZE, AffineWeight, TableWeight

STORAGE = {"uint8": "U8", "int8": "I8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
STORAGE_BYTES = {"uint8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
NESTED_TABLE_SIZE = 256
INT8_MIDDLE = 128
INT8_HIGHEST = 127  # a row's largest weight becomes ±127
ROW_MAJOR = 0  # of weight_format: others are layouts of one GPU generation

REPACKED = (
    "a model that was saved after a forward pass on some CPUs has its absmax repacked, which loses the weights: "
    "quantise it again, and save it before it is used"
)


@dataclass(frozen=True, slots=True)
class FourBitSpec:
    """Two codes a byte, the first in the high half. A code's value is its entry in a table of 16, times the block's
    maximum.

    With double quantisation the maxima are codes too, into a table of 256 with maxima of their own and one offset.
    """

    kind: str  # "nf4", "fp4"
    nested: bool  # double quantisation
    storage: str  # the dtype that the bytes are stored as

    markers = (".weight.absmax", ".weight.quant_map")

    @property
    def label(self) -> str:
        return f"bitsandbytes-{self.kind}"

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        num_bytes = -(-linear.out_features * linear.in_features // 2)
        nested = ExpectedTensor((None,), ("F32",))
        return {
            ".weight": ExpectedTensor((-(-num_bytes // STORAGE_BYTES[self.storage]), 1), (STORAGE[self.storage],)),
            ".weight.quant_map": ExpectedTensor((TABLE_SIZE,), ("F32",)),
            ".weight.absmax": ExpectedTensor((None,), ("U8",) if self.nested else ("F32",), hint=REPACKED),
            self._state: ExpectedTensor((None,), ("U8",)),
            **(
                {
                    ".weight.nested_absmax": nested,
                    ".weight.nested_quant_map": ExpectedTensor((NESTED_TABLE_SIZE,), ("F32",)),
                }
                if self.nested
                else {}
            ),
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> TableWeight:
        n, c = linear.out_features, linear.in_features
        state = self._read_state(linear, stored[self._state])
        block = state.integer("blocksize")
        if state.integers("shape") != (n, c):
            raise state.error("shape", list(state.integers("shape")), f"[{n}, {c}], as config.json makes it")
        if state.text("quant_type") != self.kind:
            raise state.error("quant_type", state.text("quant_type"), f"{self.kind}, as config.json states")
        absmax = stored[".weight.absmax"]
        _check_length(linear, ".weight.absmax", absmax, n * c, block)
        if self.nested:
            nested = check_scales(linear, ".weight.nested_absmax", stored[".weight.nested_absmax"], zero_allowed=True)
            nested_block, offset = state.integer("nested_blocksize"), state.signed_number("nested_offset")
            _check_length(linear, ".weight.nested_absmax", nested, absmax.numel(), nested_block)
            spread = nested.repeat_interleave(nested_block)[: absmax.numel()]
            absmax = stored[".weight.nested_quant_map"][absmax.int()] * spread + offset
        packed = stored[".weight"].contiguous().view(torch.uint8).flatten()
        pairs = unpack_codes(packed, 4).view(-1, 2).flip(-1)
        codes = pairs.flatten()[: n * c].view(n, c)
        table = stored[".weight.quant_map"]
        if not bool(torch.isfinite(table).all()):
            raise linear.error(".weight.quant_map", "holds NaN or Inf: the checkpoint is damaged")
        return TableWeight(codes, table, check_scales(linear, ".weight.absmax", absmax, zero_allowed=True), block)

    @property
    def _state(self) -> str:
        return f".weight.quant_state.bitsandbytes__{self.kind}"

    def _read_state(self, linear: LinearShape, stored: Tensor) -> ConfigFields:
        try:
            state = json.loads(bytes(stored.tolist()))
        except ValueError as error:
            raise linear.error(self._state, f"is not valid JSON: {error}") from None
        if not isinstance(state, dict):
            raise linear.error(self._state, "is no JSON object")
        return ConfigFields(state, f"{linear.path}{self._state}")


@dataclass(frozen=True, slots=True)
class Int8Spec:
    """Rows scaled to ±127 by their maxima.

    At inference the package computes the columns of outlying activations in 16 bits, by these same weights.
    """

    label = "bitsandbytes-int8"
    markers = (".SCB",)

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        return {
            ".weight": ExpectedTensor((linear.out_features, linear.in_features), ("I8",)),
            ".SCB": ExpectedTensor((linear.out_features,), ("F32",)),
            ".weight_format": ExpectedTensor((), ("U8",), optional=True),
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> AffineWeight:
        layout = int(stored[".weight_format"]) if ".weight_format" in stored else ROW_MAJOR
        if layout != ROW_MAJOR:
            raise linear.error(".weight_format", f"is {layout}, a layout of one GPU generation: save the model afresh")
        maxima = check_scales(linear, ".SCB", stored[".SCB"], zero_allowed=True)
        return centred_int8(stored[".weight"], maxima / INT8_HIGHEST)


def centred_int8(weight: Tensor, scale: Tensor) -> AffineWeight:
    """weight: int8 [N, C], scale: float32 [N]"""
    codes = (weight.view(torch.uint8) ^ INT8_MIDDLE).contiguous()  # in two's complement: adds 128
    zero = torch.full_like(scale, INT8_MIDDLE)
    return AffineWeight(codes, 8, scale.unsqueeze(0), zero.unsqueeze(0), weight.shape[1])


def parse(fields: ConfigFields) -> QuantSpec:
    """Raises ModelError for what is not supported, naming the field."""
    if fields.flag("load_in_8bit"):
        return Int8Spec()
    if not fields.flag("load_in_4bit"):
        raise fields.error("load_in_4bit", None, "true, or load_in_8bit: nothing else is known of bitsandbytes")
    kind, storage = fields.text("bnb_4bit_quant_type", "fp4"), fields.text("bnb_4bit_quant_storage", "uint8")
    if kind not in ("nf4", "fp4"):
        raise fields.error("bnb_4bit_quant_type", kind, "nf4 or fp4")
    if storage not in STORAGE:
        raise fields.error("bnb_4bit_quant_storage", storage, f"one of {', '.join(STORAGE)}")
    return FourBitSpec(kind, fields.flag("bnb_4bit_use_double_quant"), storage)


def _check_length(linear: LinearShape, suffix: str, maxima: Tensor, elements: int, block: int) -> None:
    wanted = -(-elements // block)
    if maxima.numel() != wanted:
        raise linear.error(
            suffix, f"has {maxima.numel()} values; {elements} weights in blocks of {block} need {wanted}"
        )
