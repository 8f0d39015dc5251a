"""The activations of the MLP, with a gate or without: one program for a piece of a row."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import Xielu

BLOCK_F = 1024


@triton.jit
def _inner(x: tl.tensor) -> tl.tensor:
    """gelu(x) = x · sigmoid of this: 0.5 (1 + tanh u) = sigmoid(2u), and the factor is 2·sqrt(2 / π)"""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _activate(
    x: tl.tensor,  # [T·F]
    out: tl.tensor,  # [T·F]
    num_elements: tl.tensor,  # T·F
    positive: tl.tensor,  # this and the next three are read if XIELU
    negative: tl.tensor,
    beta: tl.tensor,
    eps: tl.tensor,
    XIELU: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = places < num_elements
    values = tl.load(x + places, mask=inside, other=0).to(tl.float32)
    if XIELU:
        below = negative * (tl.exp(tl.minimum(values, eps)) - 1 - values)
        result = tl.where(values > 0, positive * values * values, below) + beta * values
    else:
        result = values * tl.sigmoid(_inner(values))
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


def activate(x: Tensor, xielu: Xielu | None) -> Tensor:
    """xielu None: gelu_tanh.  x: [T, F], contiguous → [T, F]"""
    assert x.is_contiguous()
    out = torch.empty_like(x)
    if x.numel():
        shape = Xielu(0.0, 0.0, 0.0, 0.0) if xielu is None else xielu
        numbers = shape.positive, shape.negative, shape.beta, shape.eps
        _activate[(triton.cdiv(x.numel(), BLOCK_F),)](
            x, out, x.numel(), *numbers, XIELU=xielu is not None, BLOCK_F=BLOCK_F
        )
    return out


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
    result = gate * tl.sigmoid(_inner(gate) if GELU else gate) * up
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
