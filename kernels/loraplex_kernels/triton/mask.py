"""Masks over the vocabulary: one program for a piece of a row, which reads a bit and writes what is forbidden."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 1024


@triton.jit
def _mask_logits(
    logits: tl.tensor,  # float32 [S, V]
    rows: tl.tensor,  # int32 [R]
    bits: tl.tensor,  # int32 [R, W]
    num_tokens: tl.tensor,  # V
    num_words: tl.tensor,  # W
    BLOCK_V: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64) * num_tokens
    tokens = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = tokens < num_tokens
    words = tl.load(bits + place * num_words + tokens // 32, mask=inside, other=-1)
    forbidden = (words >> (tokens % 32)) & 1 == 0
    tl.store(logits + row + tokens, tl.full((BLOCK_V,), float("-inf"), tl.float32), mask=inside & forbidden)


def mask_logits(logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
    """logits: float32 [S, V], contiguous; bits: int32 [R, W], for each of `rows`, on any device"""
    assert logits.is_contiguous()
    if not rows:
        return
    device, num_tokens = logits.device, logits.shape[1]
    _mask_logits[(len(rows), triton.cdiv(num_tokens, BLOCK_V))](
        logits,
        torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True),
        bits.contiguous().to(device, non_blocking=True),
        num_tokens,
        bits.shape[1],
        BLOCK_V=BLOCK_V,
    )
