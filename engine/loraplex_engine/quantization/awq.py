"""AWQ checkpoints (arXiv 2306.00978), as AutoAWQ and GPTQModel write them: 4 bits, one file layout per `version`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.weights import FLOATS, ExpectedTensor
from loraplex_engine.quantization.spec import LinearShape, check_scales, group_count, require_multiple
from loraplex_engine.quantization.unpacking import unpack_codes
from loraplex_kernels.quantized import AffineWeight

BITS = 4
PER_WORD = 8
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column GEMM_ORDER[i] of its eight
VERSIONS = ("gemm", "gemv", "gemv_fast")


@dataclass(frozen=True, slots=True)
class AwqSpec:
    version: str
    group_size: int  # -1: the whole column
    method: str = "awq"  # whose files they are

    markers = (".qweight",)

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f"-g{self.group_size}"
        return f"{self.method}-{BITS}bit{group}"

    def tensors(self, linear: LinearShape) -> dict[str, ExpectedTensor]:
        n, c, group = linear.out_features, linear.in_features, self._group(linear)
        groups, padded = group_count(linear, group), _padded_groups(c, group)
        require_multiple(linear, "input features", c, group)
        if self.version == "gemm":
            require_multiple(linear, "output features", n, PER_WORD)
            return {
                ".qweight": ExpectedTensor((c, n // PER_WORD), ("I32",)),
                ".qzeros": ExpectedTensor((groups, n // PER_WORD), ("I32",)),
                ".scales": ExpectedTensor((groups, n), FLOATS),
            }
        if self.version == "gemv":
            require_multiple(linear, "input features", c, PER_WORD)
            return {
                ".qweight": ExpectedTensor((n, c // PER_WORD), ("I32",)),
                ".qzeros": ExpectedTensor((n, padded // PER_WORD), ("I32",)),
                ".scales": ExpectedTensor((n, padded), FLOATS),
            }
        require_multiple(linear, "input features", c, 64)
        require_multiple(linear, "output features", n, 4)
        return {
            ".qweight": ExpectedTensor((n // 4, c), ("I16",)),
            ".qzeros": ExpectedTensor((padded, n), FLOATS),
            ".scales": ExpectedTensor((padded, n), FLOATS),
        }

    def read(self, linear: LinearShape, stored: Mapping[str, Tensor]) -> AffineWeight:
        group = self._group(linear)
        groups = group_count(linear, group)
        qweight, qzeros, scales = stored[".qweight"], stored[".qzeros"], stored[".scales"]
        if self.version == "gemm":
            codes, zero, scale = _gemm_columns(qweight).t().contiguous(), _gemm_columns(qzeros).float(), scales
        elif self.version == "gemv":
            codes, scale = unpack_codes(qweight, BITS), scales[:, :groups].t().contiguous()
            zero = unpack_codes(qzeros, BITS)[:, :groups].t().float()
        else:
            codes, scale = _interleaved_rows(qweight), scales[:groups]
            # Stored as −zero · scale, rounded to 16 bits: no whole number of codes.
            zero = -qzeros[:groups].float() / check_scales(linear, ".scales", scale)
            if not bool(torch.isfinite(zero).all()):
                raise linear.error(".qzeros", "holds NaN or Inf: the checkpoint is damaged")
        return AffineWeight(codes, BITS, check_scales(linear, ".scales", scale), zero.contiguous(), group)

    def _group(self, linear: LinearShape) -> int:
        return linear.in_features if self.group_size == -1 else self.group_size


def parse(fields: ConfigFields) -> AwqSpec:
    """Raises ModelError for what is not supported, naming the field."""
    bits = fields.integer("w_bit" if fields.has("w_bit") else "bits", BITS)  # the first spelling is AutoAWQ's own file
    if bits != BITS:
        raise fields.error("bits", bits, f"{BITS}: AWQ has no other kernels")
    # GPTQModel calls it a checkpoint format.
    name = next((name for name in ("version", "checkpoint_format", "format") if fields.has(name)), "version")
    version = fields.text(name, "gemm").lower()
    if version not in VERSIONS:
        raise fields.error(
            name, version, f"one of {', '.join(VERSIONS)}: other layouts fit one kernel only; save the model as gemm"
        )
    name = "q_group_size" if fields.has("q_group_size") else "group_size"
    group_size = fields.integer(name, 128, minimum=-1)
    if group_size == 0:
        raise fields.error(name, group_size, "positive, or -1 for whole columns")
    return AwqSpec(version, group_size)


def _padded_groups(in_features: int, group_size: int) -> int:
    """The groups that gemv's files have room for: whole words of zeros, and a power of two of them."""
    words = -(-(in_features // group_size) // PER_WORD)
    multiple = max(1, 128 // group_size)
    return -(-words // multiple) * multiple * PER_WORD


def _gemm_columns(words: Tensor) -> Tensor:
    """int32 [rows, columns / 8] → uint8 [rows, columns]"""
    nibbles = unpack_codes(words, BITS).view(*words.shape, PER_WORD)
    position = torch.tensor(GEMM_ORDER, device=words.device).argsort()  # of each column among the nibbles
    return nibbles[..., position].flatten(-2)


def _interleaved_rows(words: Tensor) -> Tensor:
    """gemv_fast's int16 [N / 4, C], nibble i for row i of four in blocks of 64 columns → uint8 [N, C]"""
    quarter, columns = words.shape
    # The packer writes, for rows r of a quarter and blocks k of 64: [quarter, k, (row, 64 columns) read as (64, 4)].
    nibbles = unpack_codes(words, BITS).view(quarter, columns // 64, 4, 64)
    rows = nibbles.transpose(1, 2).reshape(quarter * 4, columns)
    # Within eight: even columns, then odd ones. Within thirty-two: pairs, taken in turn from each eight.
    rows = rows.view(-1, columns // 32, 4, 2, 4).transpose(3, 4)
    return rows.reshape(-1, columns // 32, 4, 4, 2).transpose(2, 3).reshape(quarter * 4, columns)
