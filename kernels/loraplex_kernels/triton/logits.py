"""What changes logits before a token is drawn: each kernel writes the logits that change, and reads no others."""

# ruff: noqa: N803  (what is fixed when a kernel is compiled is upper case, as everywhere in Triton)

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.draws import LogitChanges, Penalties, RowTokens, Watermarks
from loraplex_kernels.transfers import to_device

BLOCK = 1024
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB - (1 << 64))


def adjust_logits(logits: Tensor, changes: LogitChanges, device: torch.device) -> None:
    """logits: float32 [S, V], contiguous, changed in place"""
    assert logits.is_contiguous()
    _mask_tails(logits, changes.limits, device)
    if changes.penalties is not None:
        _lower(logits, changes.penalties, device)
    if changes.bias is not None:
        _scatter(logits, changes.bias, changes.bias_values, device)
    if changes.watermarks is not None:
        _mark(logits, changes.watermarks, device)
    if changes.allowed is not None:
        mask_logits(logits, changes.allowed.rows, _bits(changes.allowed, logits.shape[1]), device)
    if changes.forbidden is not None:
        _scatter(logits, changes.forbidden, None, device)


# ---- ids that have no token ------------------------------------------------------------------------------------------


@triton.jit
def _mask_tail(
    logits: tl.tensor,  # float32 [S, V]
    limits: tl.tensor,  # int64 [S]
    first: tl.tensor,  # no limit is lower
    num_tokens: tl.tensor,  # V
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tokens = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    masked = (tokens < num_tokens) & (tokens >= tl.load(limits + row))
    tl.store(logits + row * num_tokens + tokens, tl.full((BLOCK,), float("-inf"), tl.float32), mask=masked)


def _mask_tails(logits: Tensor, limits: np.ndarray, device: torch.device) -> None:
    num_rows, num_tokens = logits.shape
    first = int(limits.min(initial=num_tokens))
    if first < num_tokens:
        (on_device,) = to_device([limits], device)
        grid = num_rows, triton.cdiv(num_tokens - first, BLOCK)
        _mask_tail[grid](logits, on_device, first, num_tokens, BLOCK=BLOCK)


# ---- penalties -------------------------------------------------------------------------------------------------------


@triton.jit
def _penalise(
    logits: tl.tensor,  # float32 [S, V]
    rows: tl.tensor,  # int64 [N]
    starts: tl.tensor,  # int64 [N + 1]: of each row's tokens
    token_ids: tl.tensor,  # int32, of each row different ones
    counts: tl.tensor,  # int32: how often the output has each
    repetition: tl.tensor,  # float32 [N]
    presence: tl.tensor,  # float64 [N]
    frequency: tl.tensor,  # float64 [N]
    num_tokens: tl.tensor,  # V
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    places = tl.load(starts + row) + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tl.load(starts + row + 1)
    targets = logits + tl.load(rows + row) * num_tokens + tl.load(token_ids + places, mask=inside, other=0)
    values = tl.load(targets, mask=inside, other=0.0)
    factor = tl.load(repetition + row)
    times = tl.load(counts + places, mask=inside, other=0).to(tl.float64)
    lower = tl.where(times > 0, tl.load(presence + row) + tl.load(frequency + row) * times, 0.0)
    changed = tl.where(values > 0, tl.div_rn(values, factor), values * factor) - lower.to(tl.float32)
    tl.store(targets, changed, mask=inside)


def _lower(logits: Tensor, penalties: Penalties, device: torch.device) -> None:
    tokens = penalties.tokens
    longest = int(np.diff(tokens.starts).max())
    if not longest:
        return
    columns = [tokens.rows, tokens.starts, tokens.token_ids.astype(np.int32), penalties.counts.astype(np.int32)]
    columns += [penalties.repetition.astype(np.float32), penalties.presence.astype(np.float64, copy=False)]
    columns += [penalties.frequency.astype(np.float64, copy=False)]
    _penalise[(len(tokens.rows), triton.cdiv(longest, BLOCK))](
        logits,
        *to_device(columns, device),
        logits.shape[1],
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # so that each product is rounded, as everywhere else
    )


# ---- single tokens ---------------------------------------------------------------------------------------------------


@triton.jit
def _change_tokens(
    logits: tl.tensor,  # float32 [S, V]
    rows: tl.tensor,  # int64 [N]
    token_ids: tl.tensor,  # int64 [N]
    values: tl.tensor,  # float32 [N], read if ADD
    count: tl.tensor,  # N
    num_tokens: tl.tensor,  # V
    ADD: tl.constexpr,  # else they are masked
    BLOCK: tl.constexpr,
) -> None:
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    targets = logits + tl.load(rows + places, mask=inside, other=0) * num_tokens
    targets += tl.load(token_ids + places, mask=inside, other=0)
    changed = tl.full((BLOCK,), float("-inf"), tl.float32)
    if ADD:
        changed = tl.load(targets, mask=inside, other=0.0) + tl.load(values + places, mask=inside, other=0.0)
    tl.store(targets, changed, mask=inside)


def _scatter(logits: Tensor, tokens: RowTokens, values: np.ndarray | None, device: torch.device) -> None:
    """Add values to the logits of these tokens, of which no row has one twice; None: mask them."""
    count = len(tokens.token_ids)
    if not count:
        return
    added = np.zeros(0, dtype=np.float32) if values is None else values
    rows, token_ids, on_device = to_device([tokens.row_of_each, tokens.token_ids, added], device)
    _change_tokens[(triton.cdiv(count, BLOCK),)](
        logits, rows, token_ids, on_device, count, logits.shape[1], ADD=values is not None, BLOCK=BLOCK
    )


# ---- watermarks ------------------------------------------------------------------------------------------------------


@triton.jit
def _mixed(words: tl.tensor, shift: tl.constexpr) -> tl.tensor:
    """Words of 64 bits with what is `shift` bits higher in them, with zeros before it."""
    return words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))


@triton.jit
def _raise_green(
    logits: tl.tensor,  # float32 [S, V]
    rows: tl.tensor,  # int64 [N]
    seeds: tl.tensor,  # int64 [N]
    limits: tl.tensor,  # int64 [N]: gamma · 2^53
    deltas: tl.tensor,  # float32 [N]
    num_tokens: tl.tensor,  # V
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(seeds + place) + (tokens + 1).to(tl.int64) * GOLDEN
    words = _mixed(words, 30) * FIRST_FACTOR
    words = _mixed(words, 27) * SECOND_FACTOR
    words = _mixed(words, 31)
    green = ((words >> 11) & ((1 << 53) - 1)) < tl.load(limits + place)
    targets = logits + tl.load(rows + place) * num_tokens + tokens
    changed = green & (tokens < num_tokens)
    tl.store(targets, tl.load(targets, mask=changed, other=0.0) + tl.load(deltas + place), mask=changed)


def _mark(logits: Tensor, marks: Watermarks, device: torch.device) -> None:
    columns = to_device([marks.rows, marks.seeds.view(np.int64), marks.limits, marks.deltas], device)
    num_tokens = logits.shape[1]
    _raise_green[(len(marks.rows), triton.cdiv(num_tokens, BLOCK))](logits, *columns, num_tokens, BLOCK=BLOCK)


# ---- masks -----------------------------------------------------------------------------------------------------------


@triton.jit
def _mask_logits(
    logits: tl.tensor,  # float32 [S, V]
    rows: tl.tensor,  # int64 [R]
    bits: tl.tensor,  # int32 [R, W]
    num_tokens: tl.tensor,  # V
    num_words: tl.tensor,  # W
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place) * num_tokens
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    words = tl.load(bits + place * num_words + tokens // 32, mask=inside, other=-1)
    forbidden = (words >> (tokens % 32)) & 1 == 0
    tl.store(logits + row + tokens, tl.full((BLOCK,), float("-inf"), tl.float32), mask=inside & forbidden)


def mask_logits(logits: Tensor, rows: np.ndarray, bits: np.ndarray, device: torch.device) -> None:
    """logits: float32 [S, V], contiguous; bits: int32 [R, W], for each of `rows`"""
    assert logits.is_contiguous()
    if not len(rows):
        return
    on_device = to_device([rows, bits], device)
    num_tokens = logits.shape[1]
    _mask_logits[(len(rows), triton.cdiv(num_tokens, BLOCK))](
        logits, *on_device, num_tokens, bits.shape[1], BLOCK=BLOCK
    )


def _bits(tokens: RowTokens, num_tokens: int) -> np.ndarray:
    """The tokens of each row as bits: int32 [R, W]"""
    flags = np.zeros((len(tokens.rows), triton.cdiv(num_tokens, 32) * 32), dtype=np.bool_)
    flags[np.repeat(np.arange(len(tokens.rows)), np.diff(tokens.starts)), tokens.token_ids] = True
    bits: np.ndarray = np.packbits(flags, axis=1, bitorder="little").view(np.int32)
    return bits
