"""The gated activations of the MLP: one program for a piece of a row."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_F = 1024


@triton.jit
def _activate_and_mul(
    x: tl.tensor,  # [T, 2F]
    out: tl.tensor,  # [T, F]
    num_features: tl.tensor,  # F
    GELU: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < num_features
    start = x + row * 2 * num_features + columns
    gate = tl.load(start, mask=inside, other=0).to(tl.float32)
    up = tl.load(start + num_features, mask=inside, other=0).to(tl.float32)
    # gelu: 0.5 (1 + tanh u) = sigmoid(2u), and the factor is 2·sqrt(2 / π)
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    result = gate * tl.sigmoid(inner) * up
    tl.store(out + row * num_features + columns, result.to(out.dtype.element_ty), mask=inside)


def activate_and_mul(x: Tensor, gelu: bool) -> Tensor:
    """x: [T, 2F], contiguous → [T, F]"""
    assert x.is_contiguous()
    num_rows, num_features = len(x), x.shape[1] // 2
    out = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    if num_rows:
        _activate_and_mul[(num_rows, triton.cdiv(num_features, BLOCK_F))](
            x, out, num_features, GELU=gelu, BLOCK_F=BLOCK_F
        )
    return out
