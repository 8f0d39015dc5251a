"""Norm, rotation and storing of queries, keys and values: one program for a few heads of one token."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.ops import QUANTIZED_KV, HeadShape, LayerKV, QKNorm
from loraplex_kernels.triton.codes import PLAIN, as_codes, coding_of, encode

BLOCK_H = 8


@triton.jit
def _pairs(
    lanes: tl.tensor, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The two dimensions of a head that each of D/2 lanes has: a pair that is turned, or two of the rest."""
    if INTERLEAVED:
        first, second = 2 * lanes, 2 * lanes + 1
    else:
        first, second = lanes, lanes + ROTARY_DIM // 2
    if ROTARY_DIM < HEAD_DIM:
        turned = lanes < ROTARY_DIM // 2
        beyond = lanes + ROTARY_DIM // 2
        first = tl.where(turned, first, beyond)
        second = tl.where(turned, second, beyond + (HEAD_DIM - ROTARY_DIM) // 2)
    return first, second


@triton.jit
def _rotary_store_kv(
    qkv: tl.tensor,  # [T, (H + 2K)·D]
    q_weight: tl.tensor,  # float32 [D], read if NORM
    k_weight: tl.tensor,  # float32 [D], read if NORM
    positions: tl.tensor,  # int64 [T]
    cos_sin: tl.tensor,  # float32 [max positions, 2, R/2]
    slot_mapping: tl.tensor,  # int64 [T], negative: nowhere
    q_out: tl.tensor,  # [T, H, D]
    k_cache: tl.tensor,  # [B, K, P, D]
    v_cache: tl.tensor,
    k_scale: tl.tensor,  # float32 [B, K, P], written if CODING is not PLAIN
    v_scale: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,  # R
    INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # P
    NORM: tl.constexpr,
    CODING: tl.constexpr,  # of the cache
    LARGEST: tl.constexpr,  # number of that coding
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # D/2, up to a power of two
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lanes = tl.arange(0, BLOCK_HALF)
    in_row = lanes < HEAD_DIM // 2
    in_half = in_row[None, :]
    lower, upper = _pairs(lanes, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    is_query = heads < NUM_HEADS
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)

    start = token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + heads[:, None] * HEAD_DIM
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half
    raw_first = tl.load(qkv + start + lower[None, :], mask=inside, other=0)
    raw_second = tl.load(qkv + start + upper[None, :], mask=inside, other=0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        is_query_row = is_query[:, None]
        q_first, k_first = (
            tl.load(q_weight + lower, mask=in_row, other=0),
            tl.load(k_weight + lower, mask=in_row, other=0),
        )
        q_second, k_second = (
            tl.load(q_weight + upper, mask=in_row, other=0),
            tl.load(k_weight + upper, mask=in_row, other=0),
        )
        first = first * inverse * tl.where(is_query_row, q_first[None, :], k_first[None, :])
        second = second * inverse * tl.where(is_query_row, q_second[None, :], k_second[None, :])
        # Rounded as the norm's own result would be, were it written out.
        first = first.to(raw_first.dtype).to(tl.float32)
        second = second.to(raw_first.dtype).to(tl.float32)
    angles = cos_sin + tl.load(positions + token) * ROTARY_DIM + lanes[None, :]
    turned = (lanes < ROTARY_DIM // 2)[None, :]
    cos = tl.load(angles, mask=turned, other=1)
    sin = tl.load(angles + ROTARY_DIM // 2, mask=turned, other=0)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin

    out = q_out + token * NUM_HEADS * HEAD_DIM + heads[:, None] * HEAD_DIM
    mask = is_query[:, None] & in_half
    tl.store(out + lower[None, :], turned_first.to(raw_first.dtype), mask=mask)
    tl.store(out + upper[None, :], turned_second.to(raw_first.dtype), mask=mask)

    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    kv_heads = tl.where(is_key, heads - NUM_HEADS, heads - NUM_HEADS - NUM_KV_HEADS)
    places = (block * NUM_KV_HEADS + kv_heads) * BLOCK_SIZE + offset
    first = tl.where(is_key[:, None], turned_first, raw_first.to(tl.float32))
    second = tl.where(is_key[:, None], turned_second, raw_second.to(tl.float32))
    if CODING != PLAIN:
        scale = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1) / LARGEST
        tl.store(k_scale + places, scale, mask=is_key)
        tl.store(v_scale + places, scale, mask=is_value)
        divisor = tl.where(scale == 0, 1.0, scale)[:, None]
        first, second = encode(first / divisor, CODING), encode(second / divisor, CODING)
    where = places[:, None] * HEAD_DIM
    mask = is_key[:, None] & in_half
    tl.store(k_cache + where + lower[None, :], first, mask=mask)
    tl.store(k_cache + where + upper[None, :], second, mask=mask)
    mask = is_value[:, None] & in_half
    tl.store(v_cache + where + lower[None, :], first, mask=mask)
    tl.store(v_cache + where + upper[None, :], second, mask=mask)


def rotary_store_kv(
    qkv: Tensor,  # [T, (H + 2K)·D]
    shape: HeadShape,
    qk_norm: QKNorm | None,
    positions: Tensor,  # int64 [T]
    cos_sin: Tensor,  # float32 [max positions, 2, R/2]
    cache: LayerKV,  # [B, K, P, D] each
    slot_mapping: Tensor,  # int64 [T]; a negative slot stores nothing
    interleaved: bool,
) -> Tensor:
    assert qkv.is_contiguous()
    assert cos_sin.is_contiguous()
    num_tokens, num_columns = len(qkv), shape.num_heads + 2 * shape.num_kv_heads
    q_out = torch.empty((num_tokens, shape.num_heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        _rotary_store_kv[(num_tokens, triton.cdiv(num_columns, BLOCK_H))](
            qkv,
            cos_sin if qk_norm is None else qk_norm.q_weight,
            cos_sin if qk_norm is None else qk_norm.k_weight,
            positions,
            cos_sin,
            slot_mapping,
            q_out,
            as_codes(cache.k),
            as_codes(cache.v),
            cache.k if cache.k_scale is None else cache.k_scale,
            cache.v if cache.v_scale is None else cache.v_scale,
            0.0 if qk_norm is None else qk_norm.eps,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            ROTARY_DIM=2 * cos_sin.shape[-1],
            INTERLEAVED=interleaved,
            BLOCK_SIZE=cache.block_size,
            NORM=qk_norm is not None,
            CODING=coding_of(cache.k.dtype),
            LARGEST=QUANTIZED_KV.get(cache.k.dtype, 0.0),
            BLOCK_H=BLOCK_H,
            BLOCK_HALF=triton.next_power_of_2(shape.head_dim // 2),
        )
    return q_out
