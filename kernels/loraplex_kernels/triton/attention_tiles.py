"""What both kinds of attention are made of: a tile of queries walks over cached keys with a running softmax
(FlashAttention, arXiv 2205.14135). Its queries share a kv head, so that a key is read once for all of them.
"""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import AttentionMetadata, LayerKV
from loraplex_kernels.triton.codes import PLAIN, as_codes, coding_of, decode
from loraplex_kernels.triton.primitives import LEAST_STEP, Tile, dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(
    head: tl.tensor,  # the cache [B, K, P, D], moved to the program's kv head
    scales: tl.tensor,  # [B, K, P], moved alike
    rows: tl.tensor,  # [N]: where each position's elements begin
    dims: tl.tensor,  # [D]
    row_mask: tl.tensor,  # [N]
    dim_mask: tl.tensor,  # [D]
    CODING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,  # of the activations
) -> tl.tensor:
    """The keys or the values of some positions → DTYPE [N, D]"""
    mask = row_mask[:, None] & dim_mask[None, :]
    tile = tl.load(head + (rows[:, None] + dims[None, :]), mask=mask, other=0)
    if CODING != PLAIN:
        scale = tl.load(scales + rows // HEAD_DIM, mask=row_mask, other=0)
        tile = (decode(tile, CODING) * scale[:, None]).to(DTYPE)
    return tile


@triton.jit
def _accumulate(
    accumulated: tl.tensor,  # float32 [M, D]
    total: tl.tensor,  # float32 [M]: sum of the weights so far
    highest: tl.tensor,  # float32 [M]: the highest score so far, as a power of two
    q: tl.tensor,  # [M, D]
    k_head: tl.tensor,  # the cache [B, K, P, D], moved to the program's kv head
    v_head: tl.tensor,
    k_scales: tl.tensor,  # [B, K, P], moved alike
    v_scales: tl.tensor,
    block_table: tl.tensor,  # int32, the sequence's own row
    positions: tl.tensor,  # [M]: of the queries
    dims: tl.tensor,  # [D]
    dim_mask: tl.tensor,  # [D]
    first: tl.tensor,  # keys [first, last) …
    last: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODING: tl.constexpr,
    MASKED: tl.constexpr,  # … of which some rows may not see some; else every row sees all, in whole steps
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    for step in range(first, last, BLOCK_N):
        keys = step + tl.arange(0, BLOCK_N)
        # Written so that it vanishes where there is nothing to mask.
        there = keys < last if MASKED else tl.full((BLOCK_N,), 1, tl.int1)
        blocks = tl.load(block_table + keys // BLOCK_SIZE, mask=there, other=0)
        rows = blocks.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + (keys % BLOCK_SIZE) * HEAD_DIM
        k = _load_tile(k_head, k_scales, rows, dims, there, dim_mask, CODING, HEAD_DIM, q.dtype)
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        if SOFT_CAP is None:
            scores *= SCALE * LOG2_E
        else:
            # tanh(u) = 2 sigmoid(2u) − 1
            scores = (2 * tl.sigmoid(scores * (2 * SCALE / SOFT_CAP)) - 1) * (SOFT_CAP * LOG2_E)
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if WINDOW is not None:
                visible &= keys[None, :] > positions[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = higher
        if MASKED and WINDOW is not None:
            base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees none of the keys so far
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weights, axis=1)
        v = _load_tile(v_head, v_scales, rows, dims, there, dim_mask, CODING, HEAD_DIM, q.dtype)
        accumulated = dot(weights.to(v.dtype), v, accumulated * rescale[:, None])
        highest = higher
    return accumulated, total, highest


@triton.jit
def attend(
    q: tl.tensor,  # [M, D]
    positions: tl.tensor,  # [M]: of the queries
    first_position: tl.tensor,  # the lowest of them
    kv_head: tl.tensor,
    k_cache: tl.tensor,  # [B, K, P, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # float32 [B, K, P], read if CODING is not PLAIN
    v_scale: tl.tensor,
    block_table: tl.tensor,  # int32, the sequence's own row
    dims: tl.tensor,  # [D]
    dim_mask: tl.tensor,  # [D]
    first: tl.tensor,  # keys [first, last); a multiple of BLOCK_N
    last: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODING: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """float32 [M, D], [M], [M]: the sums of the weighted values and of the weights, and the highest scores as powers
    of two."""
    accumulated = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    k_head = k_cache + kv_head * (BLOCK_SIZE * HEAD_DIM)
    v_head = v_cache + kv_head * (BLOCK_SIZE * HEAD_DIM)
    k_scales, v_scales = k_scale + kv_head * BLOCK_SIZE, v_scale + kv_head * BLOCK_SIZE
    seen_by_all = first
    if WINDOW is None:
        seen_by_all = tl.maximum(tl.minimum((first_position + 1) // BLOCK_N * BLOCK_N, last), first)
        accumulated, total, highest = _accumulate(
            accumulated, total, highest, q, k_head, v_head, k_scales, v_scales, block_table, positions, dims,
            dim_mask, first, seen_by_all, SCALE, WINDOW, SOFT_CAP, CODING, False, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
            BLOCK_N,
        )  # fmt: skip
    return _accumulate(
        accumulated, total, highest, q, k_head, v_head, k_scales, v_scales, block_table, positions, dims,
        dim_mask, seen_by_all, last, SCALE, WINDOW, SOFT_CAP, CODING, True, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
    )  # fmt: skip


def choose_tile(q: Tensor, cache: LayerKV, decode: bool) -> Tile:
    """A tile whose accumulators fit in registers, and whose keys and values of `num_stages` steps fit in 99 KiB of
    shared memory, the least that a GPU since Ampere offers."""
    smallest = triton.next_power_of_2(q.shape[1] // cache.k.shape[1])
    if q.dtype == torch.float32:  # multiplied without tensor cores, which takes the registers to run ahead with
        return Tile(max(16 if decode else 32, smallest), 16, num_warps=8, num_stages=1)
    wide, rounded = q.shape[2] > 128, cache.k_scale is not None  # rounded keys take registers on their way
    if decode:
        return Tile(max(16, smallest), 32 if wide and rounded else 64, num_warps=4, num_stages=2 if wide else 3)
    block_n, num_stages = (32, 2) if wide or rounded else (64, 3)
    return Tile(max(64 if wide else 128, smallest), block_n, num_warps=8, num_stages=num_stages)


@dataclass(frozen=True, slots=True)
class Scoring:
    """The arguments of `Ops.paged_attention` that turn a query and a key into a score."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None = None  # float32 [H]


def arguments(q: Tensor, cache: LayerKV, metadata: AttentionMetadata, scoring: Scoring, tile: Tile) -> dict[str, Any]:
    """What the kernels of both kinds take, by its name in them."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = cache.k.shape[1]
    return {
        "q": q,
        "k_cache": as_codes(cache.k),
        "v_cache": as_codes(cache.v),
        "k_scale": cache.k if cache.k_scale is None else cache.k_scale,
        "v_scale": cache.v if cache.v_scale is None else cache.v_scale,
        "query_starts": metadata.query_starts,
        "seq_lens": metadata.seq_lens,
        "block_tables": metadata.block_tables,
        "sinks": q if scoring.sinks is None else scoring.sinks,
        "num_sequences": len(metadata.seq_lens),
        "max_blocks": metadata.block_tables.stride(0),
        "SCALE": scoring.scale,
        "WINDOW": scoring.window,
        "SOFT_CAP": scoring.soft_cap,
        "CODING": coding_of(cache.k.dtype),
        "HAS_SINKS": scoring.sinks is not None,
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": cache.block_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": max(LEAST_STEP.value, triton.next_power_of_2(head_dim)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
