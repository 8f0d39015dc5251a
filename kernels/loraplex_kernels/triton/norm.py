"""RMS norm and layer norm, alone or with the addition to the residual before it: one program for each row."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(
    x: tl.tensor,  # [T, C]
    residual: tl.tensor,  # [T, C], read and written if ADD
    weight: tl.tensor,  # float32 [C]
    bias: tl.tensor,  # float32 [C], read if BIAS
    out: tl.tensor,  # [T, C]
    num_features: tl.tensor,  # C
    eps: tl.tensor,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,  # less the mean: a layer norm
    BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * num_features
    columns = tl.arange(0, BLOCK_C)
    inside = columns < num_features
    values = tl.load(x + row + columns, mask=inside, other=0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + columns, mask=inside, other=0).to(tl.float32)
        rounded = values.to(out.dtype.element_ty)
        tl.store(residual + row + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)  # the norm sees what later layers will see
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values, axis=0) / num_features, 0)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / num_features + eps)
    scaled = values * inverse * tl.load(weight + columns, mask=inside, other=0)
    if BIAS:
        scaled += tl.load(bias + columns, mask=inside, other=0)
    tl.store(out + row + columns, scaled.to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """residual += x in place, if there is one; then the norm of the sum.  x: [T, C], contiguous → [T, C]"""
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    num_rows, num_features = x.shape
    out = torch.empty_like(x)
    if num_rows:
        block = triton.next_power_of_2(num_features)
        _norm[(num_rows,)](
            x,
            x if residual is None else residual,
            weight,
            weight if bias is None else bias,
            out,
            num_features,
            eps,
            ADD=residual is not None,
            CENTRED=centred,
            BIAS=bias is not None,
            BLOCK_C=block,
            num_warps=min(16, max(4, block // 1024)),
        )
    return out
