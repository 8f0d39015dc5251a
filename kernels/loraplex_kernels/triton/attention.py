"""Paged attention: one kernel for the chunks of prompts and for decoding.

A program takes a tile of queries that share a kv head, so that a key is read once for all of them, and walks over the
sequence's blocks with a running softmax (FlashAttention, arXiv 2205.14135). Sequences with a single new token are
launched apart: when they are few, their keys are split between programs (Flash-Decoding) whose results are combined
by a second kernel.
"""

# ruff: noqa: N803, N806  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import AttentionMetadata, LayerKV
from loraplex_kernels.triton.codes import PLAIN, as_codes, coding_of, decode
from loraplex_kernels.triton.primitives import LEAST_STEP, Tile, dot, locate_tile

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_SPLIT_KEYS = tl.constexpr(256)  # fewer keys than this are not worth a program of their own
MAX_SPLITS = 64


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
def _visible_keys(length: tl.tensor, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The keys that a single new token sees, [first, length) with `first` rounded down, and the keys of each split."""
    first = 0
    if WINDOW is not None:
        first = tl.maximum(length - WINDOW, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(length - first, SPLITS)
    share = tl.maximum(tl.cdiv(share, BLOCK_N) * BLOCK_N, MIN_SPLIT_KEYS)
    return first, share


# What changes from step to step must not make a new kernel.
@triton.jit(do_not_specialize=["num_sequences", "max_blocks"])
def _attention(
    q: tl.tensor,  # [T, H, D]
    k_cache: tl.tensor,  # [B, K, P, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # float32 [B, K, P], read if CODING is not PLAIN
    v_scale: tl.tensor,
    out: tl.tensor,  # [T, H, D], or float32 [S, H, SPLITS, D] if SPLITS > 1
    log_sums: tl.tensor,  # float32 [S, H, SPLITS], written if SPLITS > 1
    query_starts: tl.tensor,  # int32 [S + 1]
    seq_lens: tl.tensor,  # int32 [S]
    block_tables: tl.tensor,  # int32 [S, max blocks]
    sinks: tl.tensor,  # float32 [H], read if HAS_SINKS
    num_sequences: tl.tensor,
    max_blocks: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODING: tl.constexpr,  # of the cache
    HAS_SINKS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a kv head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,  # sequences with one new token; else the others
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a tile: queries times GROUP
    BLOCK_N: tl.constexpr,  # keys of a step
    BLOCK_D: tl.constexpr,
) -> None:
    QUERIES: tl.constexpr = 1 if DECODE else BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tile if DECODE else locate_tile(query_starts, num_sequences, tile, QUERIES)
    row_start = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - row_start
    if (num_queries == 1) != DECODE:
        return
    first_query = 0
    if not DECODE:
        first_query = (tile - (row_start // QUERIES + sequence)) * QUERIES
        if first_query >= num_queries:
            return

    length = tl.load(seq_lens + sequence)
    first_position = length - num_queries + first_query  # of the tile's first query
    if DECODE:
        first, share = _visible_keys(length, WINDOW, SPLITS, BLOCK_N)
        first += split * share
        last = tl.minimum(first + share, length) if SPLITS > 1 else length
        if SPLITS > 1 and first >= length:
            return
    else:
        first = 0
        if WINDOW is not None:
            first = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(first_position + QUERIES, length)

    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = (rows < QUERIES * GROUP) & (queries < num_queries)
    dims = tl.arange(0, BLOCK_D)
    # Written so that it vanishes where there is nothing to mask.
    dim_mask = dims < HEAD_DIM if HEAD_DIM < BLOCK_D else tl.full((BLOCK_D,), 1, tl.int1)
    q_rows = (row_start + queries).to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q_tile = tl.load(q + q_rows[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0)

    accumulated = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    k_head = k_cache + kv_head * (BLOCK_SIZE * HEAD_DIM)
    v_head = v_cache + kv_head * (BLOCK_SIZE * HEAD_DIM)
    k_scales, v_scales = k_scale + kv_head * BLOCK_SIZE, v_scale + kv_head * BLOCK_SIZE
    block_table = block_tables + sequence.to(tl.int64) * max_blocks
    positions = first_position + rows // GROUP
    seen_by_all = first
    if WINDOW is None:
        seen_by_all = tl.maximum(tl.minimum((first_position + 1) // BLOCK_N * BLOCK_N, last), first)
        accumulated, total, highest = _accumulate(
            accumulated, total, highest, q_tile, k_head, v_head, k_scales, v_scales, block_table, positions, dims,
            dim_mask, first, seen_by_all, SCALE, WINDOW, SOFT_CAP, CODING, False, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
            BLOCK_N,
        )  # fmt: skip
    accumulated, total, highest = _accumulate(
        accumulated, total, highest, q_tile, k_head, v_head, k_scales, v_scales, block_table, positions, dims,
        dim_mask, seen_by_all, last, SCALE, WINDOW, SOFT_CAP, CODING, True, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
    )  # fmt: skip

    if HAS_SINKS and SPLITS == 1:
        total += tl.exp2(tl.load(sinks + heads, mask=row_mask, other=0) * LOG2_E - highest)
    attended = accumulated / tl.maximum(total, 1e-30)[:, None]
    if SPLITS > 1:
        part = (sequence.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * SPLITS + split
        tl.store(log_sums + part, highest + tl.log2(total), mask=row_mask)
        tl.store(out + part[:, None] * HEAD_DIM + dims[None, :], attended, mask=q_mask)
    else:
        place = out + q_rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(place, attended.to(out.dtype.element_ty), mask=q_mask)


@triton.jit
def _combine(
    parts: tl.tensor,  # float32 [S, H, SPLITS, D]: the attention over each split alone
    log_sums: tl.tensor,  # float32 [S, H, SPLITS]: log2 of the sum of each split's exponentials
    out: tl.tensor,  # [T, H, D]
    query_starts: tl.tensor,
    seq_lens: tl.tensor,
    sinks: tl.tensor,  # float32 [H], read if HAS_SINKS
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - row != 1:
        return
    length = tl.load(seq_lens + sequence)
    first, share = _visible_keys(length, WINDOW, SPLITS, BLOCK_N)
    splits = tl.arange(0, SPLITS)
    written = splits * share < length - first
    part = (sequence.to(tl.int64) * NUM_HEADS + head) * SPLITS + splits
    log_sum = tl.load(log_sums + part, mask=written, other=float("-inf"))
    highest = tl.max(log_sum, axis=0)
    weights = tl.where(written, tl.exp2(log_sum - highest), 0.0)
    dims = tl.arange(0, BLOCK_D)
    mask = written[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0)
    total = tl.maximum(tl.sum(weights, axis=0), 1e-30)
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head) * LOG2_E - highest)
    attended = tl.sum(values * weights[:, None], axis=0) / total
    place = out + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(place, attended.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def _choose_tile(q: Tensor, cache: LayerKV, decode: bool) -> Tile:
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


def _choose_splits(num_tiles: int, max_seq_len: int, num_multiprocessors: int) -> int:
    """The number of programs that share the keys of a decoding sequence, so that each multiprocessor gets two."""
    wanted = 2 * num_multiprocessors // num_tiles
    useful = max_seq_len // MIN_SPLIT_KEYS.value
    return int(triton.next_power_of_2(max(1, min(wanted, useful, MAX_SPLITS))))


@dataclass(frozen=True, slots=True)
class Scoring:
    """The arguments of `Ops.paged_attention` that turn a query and a key into a score."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None = None  # float32 [H]


def paged_attention(
    q: Tensor,  # [T, H, D]
    cache: LayerKV,  # [B, K, P, D] each
    metadata: AttentionMetadata,
    scoring: Scoring,
    num_multiprocessors: int,
) -> Tensor:
    """→ [T, H·D]. A sequence of length 0 with one query gets zeros."""
    assert q.is_contiguous()
    out = torch.empty_like(q)
    num_sequences = len(metadata.seq_lens)
    if metadata.max_query_len > 1:
        _launch(q, out, None, cache, metadata, scoring, splits=1, decode=False)
    if metadata.max_query_len == 1 or num_sequences > 1:
        num_heads, head_dim = q.shape[1:]
        splits = _choose_splits(num_sequences * cache.k.shape[1], metadata.max_seq_len, num_multiprocessors)
        if splits == 1:
            _launch(q, out, None, cache, metadata, scoring, splits, decode=True)
        else:
            parts = torch.empty((num_sequences, num_heads, splits, head_dim), dtype=torch.float32, device=q.device)
            log_sums = torch.empty((num_sequences, num_heads, splits), dtype=torch.float32, device=q.device)
            _launch(q, parts, log_sums, cache, metadata, scoring, splits, decode=True)
            _combine[(num_sequences, num_heads)](
                parts,
                log_sums,
                out,
                metadata.query_starts,
                metadata.seq_lens,
                out if scoring.sinks is None else scoring.sinks,
                HAS_SINKS=scoring.sinks is not None,
                WINDOW=scoring.window,
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
                SPLITS=splits,
                BLOCK_N=_choose_tile(q, cache, decode=True).block_n,
                BLOCK_D=triton.next_power_of_2(head_dim),
            )
    return out.flatten(1)


def _launch(
    q: Tensor,
    out: Tensor,  # [T, H, D], or float32 [S, H, splits, D]
    log_sums: Tensor | None,  # float32 [S, H, splits], if splits > 1
    cache: LayerKV,
    metadata: AttentionMetadata,
    scoring: Scoring,
    splits: int,
    decode: bool,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_sequences, num_kv_heads = len(metadata.seq_lens), cache.k.shape[1]
    group = num_heads // num_kv_heads
    tile = _choose_tile(q, cache, decode)
    num_tiles = num_sequences if decode else num_tokens // (tile.block_m // group) + num_sequences
    _attention[(num_tiles, num_kv_heads, splits)](
        q,
        as_codes(cache.k),
        as_codes(cache.v),
        cache.k if cache.k_scale is None else cache.k_scale,
        cache.v if cache.v_scale is None else cache.v_scale,
        out,
        out if log_sums is None else log_sums,
        metadata.query_starts,
        metadata.seq_lens,
        metadata.block_tables,
        out if scoring.sinks is None else scoring.sinks,
        num_sequences,
        metadata.block_tables.stride(0),
        SCALE=scoring.scale,
        WINDOW=scoring.window,
        SOFT_CAP=scoring.soft_cap,
        CODING=coding_of(cache.k.dtype),
        HAS_SINKS=scoring.sinks is not None,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.block_size,
        DECODE=decode,
        SPLITS=splits,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(LEAST_STEP, triton.next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
