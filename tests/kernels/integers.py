"""Products of integers as NumPy has them, row by row, and random weights for them."""

from __future__ import annotations

import numpy as np
import torch

from loraplex_kernels.quantized import InputRounding, IntegerWeight

ROUNDINGS = {
    "symmetric": InputRounding(),
    "asymmetric": InputRounding(symmetric=False),
    "given": InputRounding(scale=0.0173),
    "given, asymmetric": InputRounding(symmetric=False, scale=0.0211, zero=-31),
}


def random_weight(rows: int, columns: int, rounding: InputRounding, seed: int = 3) -> IntegerWeight:
    """Codes down to -128, among them rows of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    codes[:: max(1, rows // 3)] = -128
    return IntegerWeight(codes, torch.rand(rows, generator=generator) / 99 + 1e-4, rounding)


def random_inputs(rows: int, columns: int, dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    """Some rows are of extremes only, of one sign, tiny or zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[1::7] = x[1::7].sign() * 2.5
    x[2::7] = x[2::7].abs()
    x[3::7] = -x[3::7].abs()
    x[4::7] *= 1e-4
    x[5::7] = 0
    return x.to(dtype)


def rounding_of(row: np.ndarray, rounding: InputRounding) -> tuple[np.float32, np.float32]:
    """The scale of a row and its zero point."""
    if rounding.scale is not None:
        return np.float32(rounding.scale), np.float32(rounding.zero)
    if rounding.symmetric:
        return np.abs(row).max() / np.float32(127), np.float32(0)
    low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    return scale, np.rint(np.clip(np.float32(-128) - low / scale, -128, 127)) if scale else np.float32(0)


def integer_product(x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y = scale · Σ (q − z) · codes · s + bias: the sum in 64-bit integers, the rest in float32, in this order."""
    codes, results = weight.codes.numpy().astype(np.int64), []
    for row in x.float().numpy():
        scale, zero = rounding_of(row, weight.inputs)
        rounded = np.zeros(len(row)) if scale == 0 else np.clip(np.rint(row / scale + zero), -128, 127) - zero
        sums = codes @ rounded.astype(np.int64)
        results.append(weight.scale.numpy() * sums.astype(np.float32) * scale)
    y = torch.from_numpy(np.stack(results)) if results else torch.empty(0, len(codes))
    return (y if bias is None else y + bias.float()).to(x.dtype)
