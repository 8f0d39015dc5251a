"""Paged attention: the chunks of prompts here, and sequences with a single new token (`decoding`) in launches apart."""

# ruff: noqa: N803, N806  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import AttentionMetadata, LayerKV
from loraplex_kernels.triton.attention_tiles import LOG2_E, Scoring, arguments, attend, choose_tile
from loraplex_kernels.triton.decoding import attend_decoding
from loraplex_kernels.triton.primitives import locate_tile


# What changes from step to step must not make a new kernel.
@triton.jit(do_not_specialize=["num_sequences", "max_blocks"])
def _attention(
    q: tl.tensor,  # [T, H, D]
    k_cache: tl.tensor,  # [B, K, P, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # float32 [B, K, P], read if CODING is not PLAIN
    v_scale: tl.tensor,
    out: tl.tensor,  # [T, H, D]
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
    BLOCK_M: tl.constexpr,  # rows of a tile: queries times GROUP
    BLOCK_N: tl.constexpr,  # keys of a step
    BLOCK_D: tl.constexpr,
) -> None:
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = locate_tile(query_starts, num_sequences, tile, QUERIES)
    row_start = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - row_start
    first_query = (tile - (row_start // QUERIES + sequence)) * QUERIES
    if num_queries == 1 or first_query >= num_queries:
        return
    first_position = tl.load(seq_lens + sequence) - num_queries + first_query  # of the tile's first query
    first = 0
    if WINDOW is not None:
        first = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    last = first_position + tl.minimum(QUERIES, num_queries - first_query)

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
    accumulated, total, highest = attend(
        q_tile, first_position + rows // GROUP, first_position, kv_head, k_cache, v_cache, k_scale, v_scale,
        block_tables + sequence.to(tl.int64) * max_blocks, dims, dim_mask, first, last, SCALE, WINDOW, SOFT_CAP,
        CODING, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + heads, mask=row_mask, other=0) * LOG2_E - highest)
    attended = accumulated / tl.maximum(total, 1e-30)[:, None]
    tl.store(out + q_rows[:, None] * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=q_mask)


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
        tile = choose_tile(q, cache, decode=False)
        num_kv_heads = cache.k.shape[1]
        num_tiles = len(q) // (tile.block_m // (q.shape[1] // num_kv_heads)) + num_sequences
        _attention[(num_tiles, num_kv_heads)](out=out, **arguments(q, cache, metadata, scoring, tile))
    if metadata.max_query_len == 1 or num_sequences > 1:
        attend_decoding(q, out, cache, metadata, scoring, num_multiprocessors)
    return out.flatten(1)
