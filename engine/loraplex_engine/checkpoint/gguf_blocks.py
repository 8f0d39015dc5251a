"""The block types of GGUF files: rows of bytes as records, whose values are those of ggml to the last bit.

A block of the older types has 32 elements and a scale; one of the "K" types 256, in groups with scales of a few bits
each, which a float16 multiplies. Letters: N rows, B blocks of a row.  Source: ggml's headers, and its gguf package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from loraplex_kernels.quantized import AffineWeight, MinimumWeight, QuantizedWeight, TableWeight, dequantize

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
K = 256  # elements of a block of the K types
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled


def record_of(name: str, rows: Tensor) -> QuantizedWeight:
    """The matrix that `rows` hold, uint8 [N, bytes of a row] in blocks of the type `name`."""
    nbytes, read = READERS[name]
    return read(rows.reshape(len(rows), -1, nbytes))


def dequantize_rows(name: str, rows: Tensor) -> Tensor:
    """The numbers that `rows` hold: float32 [N, C]; of float types as they are stored."""
    if name in FLOAT_TYPES:
        return rows.view(FLOAT_TYPES[name])
    return dequantize(record_of(name, rows))


def _q4_0(blocks: Tensor) -> AffineWeight:
    scale, codes = _split(blocks, 2, 16)
    return _affine(_nibbles(codes), 4, _float16(scale), 8)


def _q4_1(blocks: Tensor) -> MinimumWeight:
    scale, lowest, codes = _split(blocks, 2, 2, 16)
    return _minimum(_nibbles(codes), 4, _float16(scale), -_float16(lowest))


def _q5_0(blocks: Tensor) -> AffineWeight:
    scale, high, low = _split(blocks, 2, 4, 16)
    return _affine(_nibbles(low) | _bits(high) << 4, 5, _float16(scale), 16)


def _q5_1(blocks: Tensor) -> MinimumWeight:
    scale, lowest, high, low = _split(blocks, 2, 2, 4, 16)
    return _minimum(_nibbles(low) | _bits(high) << 4, 5, _float16(scale), -_float16(lowest))


def _q8_0(blocks: Tensor) -> AffineWeight:
    scale, codes = _split(blocks, 2, 32)
    return _affine(codes ^ 128, 8, _float16(scale), 128)


def _q2_k(blocks: Tensor) -> MinimumWeight:
    both, codes, scale, lowest = _split(blocks, K // 16, K // 4, 2, 2)
    return _minimum(_fields(codes, 2, 32), 2, _float16(scale), _float16(lowest), both & 15, both >> 4)


def _q3_k(blocks: Tensor) -> AffineWeight:
    high, low, scales, scale = _split(blocks, K // 8, K // 4, 12, 2)
    codes = _fields(low, 2, 32) | _fields(high, 1, 32) << 2
    factors = _fields(scales[..., :8], 4, 8) | _fields(scales[..., 8:], 2, 4) << 4
    return _affine(codes, 3, _float16(scale), 4, factors.float() - 32)


def _q4_k(blocks: Tensor) -> MinimumWeight:
    scale, lowest, factors, codes = _split(blocks, 2, 2, 12, K // 2)
    of_scale, of_lowest = _six_bits(factors)
    return _minimum(_fields(codes, 4, 32), 4, _float16(scale), _float16(lowest), of_scale, of_lowest)


def _q5_k(blocks: Tensor) -> MinimumWeight:
    scale, lowest, factors, high, low = _split(blocks, 2, 2, 12, K // 8, K // 2)
    of_scale, of_lowest = _six_bits(factors)
    codes = _fields(low, 4, 32) | _fields(high, 1, 32) << 4
    return _minimum(codes, 5, _float16(scale), _float16(lowest), of_scale, of_lowest)


def _q6_k(blocks: Tensor) -> AffineWeight:
    low, high, factors, scale = _split(blocks, K // 2, K // 4, K // 16, 2)
    codes = _fields(low, 4, 64) | _fields(high, 2, 32) << 4
    return _affine(codes, 6, _float16(scale), 32, factors.view(torch.int8))


def _iq4_nl(blocks: Tensor) -> TableWeight:
    scale, codes = _split(blocks, 2, 16)
    return _table(_nibbles(codes), IQ4_VALUES, _float16(scale))


def _iq4_xs(blocks: Tensor) -> TableWeight:
    scale, high, low, codes = _split(blocks, 2, 2, K // 64, K // 2)
    factors = _interleaved(low, 4) | _interleaved(high, 2) << 4
    return _table(_fields(codes, 4, 16), IQ4_VALUES, _float16(scale) * (factors.float() - 32))


def _mxfp4(blocks: Tensor) -> TableWeight:
    exponent, codes = _split(blocks, 1, 16)
    bits = exponent.int()
    halved = torch.where(bits < 2, 0x00200000 << bits.clamp(max=1), (bits - 1) << 23)
    return _table(_nibbles(codes), MXFP4_VALUES, halved.view(torch.float32))


Read = Callable[[Tensor], QuantizedWeight]  # of uint8 [N, B, bytes of a block]
READERS: Mapping[str, tuple[int, Read]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs),
    "MXFP4": (17, _mxfp4),
}


# ---- parts of blocks -----------------------------------------------------------------------------------------------


def _split(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return torch.split(blocks, list(sizes), dim=-1)


def _float16(two_bytes: Tensor) -> Tensor:
    """[N, B, 2] → float32 [N, B, 1]"""
    return two_bytes.contiguous().view(torch.float16).float()


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Fields of so many bits: the lowest ones of `run` bytes, then the next of the same bytes, up to the highest; then
    those of the next run.  [N, B, bytes] → [N, B, bytes · 8 / bits]"""
    runs = packed.reshape(*packed.shape[:2], -1, run)
    return torch.stack([runs >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-2).flatten(2)


def _nibbles(packed: Tensor) -> Tensor:
    return _fields(packed, 4, packed.shape[-1])


def _interleaved(packed: Tensor, bits: int) -> Tensor:
    """Fields of so many bits in the order of the bytes, each byte's from the lowest bits on."""
    return _fields(packed, bits, 1)


def _bits(packed: Tensor) -> Tensor:
    return _interleaved(packed, 1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of scales and of minima of Q4_K and Q5_K: of the first four groups in six bits of a byte, of the last
    four in a nibble and the two bits that are left there.  [N, B, 12] → twice [N, B, 8]"""
    first, second, nibbles = _split(packed, 4, 4, 4)
    scales = torch.cat((first & 63, nibbles & 15 | first >> 2 & 48), dim=-1)
    minima = torch.cat((second & 63, nibbles >> 4 | second >> 2 & 48), dim=-1)
    return scales, minima


# ---- records -------------------------------------------------------------------------------------------------------


def _affine(codes: Tensor, bits: int, scale: Tensor, zero: int, factors: Tensor | None = None) -> AffineWeight:
    """codes: [N, B, elements]; scale: [N, B, 1]; factors: of the scale for each group, [N, B, groups of a block]."""
    whole = scale if factors is None else scale * factors
    by_group = _by_group(whole)
    unit = None if factors is None else _by_group(scale)
    zeros = torch.full_like(by_group, zero)
    return AffineWeight(codes.flatten(1), bits, by_group, zeros, _group_size(codes, whole), scale_unit=unit)


def _minimum(
    codes: Tensor,
    bits: int,
    scale: Tensor,
    minimum: Tensor,
    of_scale: Tensor | None = None,
    of_minimum: Tensor | None = None,
) -> MinimumWeight:
    """codes: [N, B, elements]; scale, minimum: [N, B, 1]; of_…: their factors, as in `_affine`."""
    if of_scale is None or of_minimum is None:
        return MinimumWeight(codes.flatten(1), bits, _by_group(scale), _by_group(minimum), _group_size(codes, scale))
    scales, minima = scale * of_scale, minimum * of_minimum
    units = _by_group(scale), _by_group(minimum)
    return MinimumWeight(
        codes.flatten(1), bits, _by_group(scales), _by_group(minima), _group_size(codes, scales), *units
    )


def _table(codes: Tensor, values: Sequence[int], scale: Tensor) -> TableWeight:
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)
    return TableWeight(codes.flatten(1), table, scale.flatten(), _group_size(codes, scale))


def _group_size(codes: Tensor, scale: Tensor) -> int:
    return codes.shape[-1] // scale.shape[-1]


def _by_group(scale: Tensor) -> Tensor:
    """[N, B, groups] → [B · groups, N]"""
    return scale.flatten(1).t().contiguous()
