"""Attention of sequences with a single new token: their keys in chunks, which a constant number of programs share out.

A sequence's keys are cut into chunks by its length alone (Flash-Decoding), whoever else is in the step, so that its
result has the same bits beside any others. All chunks of all sequences and kv heads are numbered in a row, of which
program p of n takes every n-th from p on: one sequence of many keys costs what its bytes cost, as they are spread over
all programs. Each program counts the chunks for itself, of some hundred sequences at a time, from the lengths on the
device: a captured CUDA graph is right for all lengths, and the host plans nothing. Where a sequence has several chunks,
a second kernel adds them up in order.
"""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import AttentionMetadata, LayerKV
from loraplex_kernels.triton.attention_tiles import LOG2_E, Scoring, arguments, attend, choose_tile
from loraplex_kernels.triton.primitives import PROGRAMS_EACH, RANGES_AT_ONCE, locate_work

MIN_CHUNK = tl.constexpr(256)  # keys: fewer are not worth a program's turn
MAX_CHUNKS = tl.constexpr(64)  # of a sequence: those of long ones are longer
CHUNKS_AT_ONCE = tl.constexpr(8)  # that are added up


@triton.jit
def _chunks(lengths: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Of sequences of such lengths: the first key that the new token sees, rounded down to a multiple of BLOCK_N; the
    keys of a chunk; and the number of chunks, 1 where there are no keys."""
    firsts = lengths * 0
    if WINDOW is not None:
        firsts = tl.maximum(lengths - WINDOW, 0) // BLOCK_N * BLOCK_N
    sizes = tl.cdiv(tl.cdiv(lengths - firsts, MAX_CHUNKS), BLOCK_N) * BLOCK_N
    sizes = tl.maximum(sizes, MIN_CHUNK)
    return firsts, sizes, tl.maximum(tl.cdiv(lengths - firsts, sizes), 1)


@triton.jit
def _chunks_through(
    query_starts: tl.tensor,  # int32 [S + 1]
    seq_lens: tl.tensor,  # int32 [S]
    first: tl.tensor,
    num_sequences: tl.tensor,  # S
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Of RANGES_AT_ONCE sequences from `first` on: the chunks of those up to each, where they decode → int32, and the
    chunks of all."""
    sequences = first + tl.arange(0, RANGES_AT_ONCE)
    there = sequences < num_sequences
    ends = tl.load(query_starts + sequences + 1, mask=there, other=0)
    decoding = ends - tl.load(query_starts + sequences, mask=there, other=0) == 1
    _, _, counts = _chunks(tl.load(seq_lens + sequences, mask=there, other=0), WINDOW, BLOCK_N)
    counts = tl.where(decoding, counts, 0)
    return tl.cumsum(counts, axis=0), tl.sum(counts, axis=0)


# What changes from step to step must not make a new kernel.
@triton.jit(do_not_specialize=["num_sequences", "max_blocks", "max_chunks"])
def _decode(
    q: tl.tensor,  # [T, H, D]
    k_cache: tl.tensor,  # [B, K, P, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # float32 [B, K, P], read if CODING is not PLAIN
    v_scale: tl.tensor,
    out: tl.tensor,  # [T, H, D]: of sequences of one chunk
    parts: tl.tensor,  # float32 [S, H, max chunks, D]: of the others, the attention over each chunk alone
    log_sums: tl.tensor,  # float32 [S, H, max chunks]: log2 of the sum of each chunk's exponentials
    query_starts: tl.tensor,  # int32 [S + 1]
    seq_lens: tl.tensor,  # int32 [S]
    block_tables: tl.tensor,  # int32 [S, max blocks]
    sinks: tl.tensor,  # float32 [H], read if HAS_SINKS
    num_sequences: tl.tensor,
    max_blocks: tl.tensor,
    max_chunks: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODING: tl.constexpr,  # of the cache
    HAS_SINKS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a kv head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # no fewer than GROUP
    BLOCK_N: tl.constexpr,  # keys of a step
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < GROUP
    dims = tl.arange(0, BLOCK_D)
    # Written so that it vanishes where there is nothing to mask.
    dim_mask = dims < HEAD_DIM if HEAD_DIM < BLOCK_D else tl.full((BLOCK_D,), 1, tl.int1)
    q_mask = row_mask[:, None] & dim_mask[None, :]
    work, before = tl.program_id(0), 0  # before: chunks of sequences before `some`
    for some in range(0, num_sequences, RANGES_AT_ONCE):
        through, num_chunks = _chunks_through(query_starts, seq_lens, some, num_sequences, WINDOW, BLOCK_N)
        while work < (before + num_chunks) * NUM_KV_HEADS:
            sequence, chunk = locate_work(through, work // NUM_KV_HEADS - before)
            sequence += some
            kv_head = work % NUM_KV_HEADS
            heads = kv_head * GROUP + rows
            row = tl.load(query_starts + sequence)
            length = tl.load(seq_lens + sequence)
            first, size, count = _chunks(length, WINDOW, BLOCK_N)
            first += chunk * size
            q_rows = row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
            q_tile = tl.load(q + q_rows[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0)
            accumulated, total, highest = attend(
                q_tile, rows * 0 + (length - 1), length - 1, kv_head, k_cache, v_cache, k_scale, v_scale,
                block_tables + sequence.to(tl.int64) * max_blocks, dims, dim_mask, first,
                tl.minimum(first + size, length), SCALE, WINDOW, SOFT_CAP, CODING, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
                BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if count == 1:
                if HAS_SINKS:
                    total += tl.exp2(tl.load(sinks + heads, mask=row_mask, other=0) * LOG2_E - highest)
                attended = (accumulated / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
                tl.store(out + q_rows[:, None] * HEAD_DIM + dims[None, :], attended, mask=q_mask)
            else:
                part = (sequence.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * max_chunks + chunk
                tl.store(log_sums + part, highest + tl.log2(total), mask=row_mask)
                place = parts + part[:, None] * HEAD_DIM + dims[None, :]
                tl.store(place, accumulated / total[:, None], mask=q_mask)
            work += tl.num_programs(0)
        before += num_chunks


@triton.jit(do_not_specialize=["max_chunks"])
def _combine(
    parts: tl.tensor,  # float32 [S, H, max chunks, D]
    log_sums: tl.tensor,  # float32 [S, H, max chunks]
    out: tl.tensor,  # [T, H, D]
    query_starts: tl.tensor,
    seq_lens: tl.tensor,
    sinks: tl.tensor,  # float32 [H], read if HAS_SINKS
    max_chunks: tl.tensor,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    _, _, count = _chunks(tl.load(seq_lens + sequence), WINDOW, BLOCK_N)
    if tl.load(query_starts + sequence + 1) - row != 1 or count == 1:
        return
    part = (sequence.to(tl.int64) * NUM_HEADS + head) * max_chunks
    chunks = tl.arange(0, MAX_CHUNKS)
    log_sum = tl.load(log_sums + part + chunks, mask=chunks < count, other=float("-inf"))
    highest = tl.max(log_sum, axis=0)
    total = tl.sum(tl.exp2(log_sum - highest), axis=0)
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head) * LOG2_E - highest)
    dims = tl.arange(0, BLOCK_D)
    attended = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, count, CHUNKS_AT_ONCE):
        some = first + tl.arange(0, CHUNKS_AT_ONCE)
        weights = tl.exp2(tl.load(log_sums + part + some, mask=some < count, other=float("-inf")) - highest)
        mask = (some < count)[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(parts + (part + some)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0)
        attended += tl.sum(values * weights[:, None], axis=0)
    place = out + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(place, (attended / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def attend_decoding(
    q: Tensor,  # [T, H, D]
    out: Tensor,  # [T, H, D]; written for sequences with one query
    cache: LayerKV,
    metadata: AttentionMetadata,
    scoring: Scoring,
    num_multiprocessors: int,
) -> None:
    num_sequences, (num_heads, head_dim) = len(metadata.seq_lens), q.shape[1:]
    tile = choose_tile(q, cache, decode=True)
    most_keys = metadata.max_seq_len
    if scoring.window is not None:
        most_keys = min(most_keys, scoring.window + tile.block_n)
    max_chunks = min(max(triton.cdiv(most_keys, MIN_CHUNK.value), 1), MAX_CHUNKS.value)
    shape = (num_sequences, num_heads, max_chunks) if max_chunks > 1 else (0, 0, 0)
    parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    log_sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    num_programs = min(PROGRAMS_EACH * num_multiprocessors, num_sequences * cache.k.shape[1] * max_chunks)
    _decode[(num_programs,)](
        out=out,
        parts=parts,
        log_sums=log_sums,
        max_chunks=max_chunks,
        **arguments(q, cache, metadata, scoring, tile),
    )
    if max_chunks > 1:
        _combine[(num_sequences, num_heads)](
            parts,
            log_sums,
            out,
            metadata.query_starts,
            metadata.seq_lens,
            q if scoring.sinks is None else scoring.sinks,
            max_chunks,
            HAS_SINKS=scoring.sinks is not None,
            WINDOW=scoring.window,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_N=tile.block_n,
            BLOCK_D=triton.next_power_of_2(head_dim),
        )
