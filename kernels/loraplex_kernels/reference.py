"""Every operation in plain torch: the definition of correct results, and the backend that works everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_kernels.integers import integer_linear
from loraplex_kernels.lora_shape import LoraShape
from loraplex_kernels.ops import (
    QUANTIZED_KV,
    AttentionMetadata,
    HeadShape,
    LayerKV,
    LinearGroup,
    LoraSegments,
    LoraTable,
    LoraTableGroup,
    LoraWeights,
    PackedLinear,
    PackedLora,
    QKNorm,
    Routes,
    Routing,
    Xielu,
)
from loraplex_kernels.quantized import IntegerWeight, QuantizedWeight, dequantize
from loraplex_kernels.routes import route
from loraplex_kernels.sampling import TorchSampling

# Bounds the float32 temporaries of attention: 2^24 elements are 64 MiB.
MAX_ATTENTION_ELEMENTS = 1 << 24


class ReferenceLinear:
    """A dense weight matrix. Shares memory with its source tensors."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight  # [N, C]
        self.bias = bias  # [N]
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)


class ReferenceQuantizedLinear:
    """A quantised matrix, kept as its record with a byte per code and dequantised anew in each product."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias  # [N]
        self.out_features, self.in_features = weight.codes.shape
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)


class ReferenceGroup:
    """The linears of several experts."""

    def __init__(self, experts: Sequence[PackedLinear]) -> None:
        self.experts = tuple(experts)
        self.out_features, self.in_features = experts[0].out_features, experts[0].in_features

    def one_by_one(self, x: Tensor, group_starts: Tensor, linear: Callable[[Tensor, PackedLinear], Tensor]) -> Tensor:
        """`Ops.grouped_linear`, where each expert's linear is an operation of its own."""
        y = x.new_empty((len(x), self.out_features))
        for expert, (start, end) in zip(self.experts, pairwise(group_starts.tolist()), strict=True):
            if start < end:
                y[start:end] = linear(x[start:end], expert)
        return y


class ReferenceLora:
    """Float32 copies of A and B: both products accumulate in float32 and round once, and small ones are quickest so.

    A 16-bit adapter takes twice its own bytes.
    """

    def __init__(self, weights: LoraWeights) -> None:
        self.shape = LoraShape.of(weights)
        self.a_t = weights.a.float().t()  # [C, sum of R]
        self.slices = tuple(  # ranks, output columns, Bᵀ [R, N]
            (
                slice(part.rank_start, part.rank_start + part.b.shape[1]),
                slice(part.out_start, part.out_start + part.b.shape[0]),
                part.b.float().t(),
            )
            for part in weights.slices
        )
        self.affine = weights.affine

    @property
    def nbytes(self) -> int:
        affine_bytes = 0 if self.affine is None else self.affine.nbytes
        return self.a_t.nbytes + sum(b_t.nbytes for _, _, b_t in self.slices) + affine_bytes


class ReferenceLoraTable:
    """The adapters resident at one linear."""

    def __init__(self, in_features: int, out_features: int, num_slots: int) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.adapters: list[ReferenceLora | None] = [None] * num_slots

    def put(self, slot: int, packed: PackedLora) -> None:
        assert isinstance(packed, ReferenceLora)
        packed.shape.check_fits(self.in_features, self.out_features)
        self.adapters[slot] = packed

    def remove(self, slot: int) -> None:
        self.adapters[slot] = None

    def adapter(self, slot: int) -> ReferenceLora | None:
        return self.adapters[slot]

    def reserve(self, num_slices: int, rank: int) -> None:
        """Nothing to do: each adapter has its own memory."""


class ReferenceLoraTables:
    """The tables of several experts, one slot of each after another."""

    def __init__(self, tables: Sequence[ReferenceLoraTable]) -> None:
        self.num_experts = len(tables)
        self._tables = tuple(tables)

    def adapter(self, slot: int) -> ReferenceLora | None:
        own, expert = divmod(slot, self.num_experts)
        return self._tables[expert].adapter(own)


class ReferenceOps(TorchSampling):
    """`Ops` in plain torch, on any device."""

    name = "reference"
    compiled_for = ""
    batch_invariant = False  # the libraries behind torch choose their summation order by the number of rows
    packing_copies = False
    own_threads = False
    kv_layout = "reference"
    capturable = False  # it asks the device for sizes
    lora_growth = 0  # a table is a list of adapters, each as wide as it is

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pack_linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> ReferenceLinear:
        return ReferenceLinear(weights[0] if len(weights) == 1 else torch.cat(list(weights)), bias)

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> ReferenceQuantizedLinear:
        return ReferenceQuantizedLinear(weight, bias)

    def dequantize(self, packed: PackedLinear, start: int, end: int) -> Tensor:
        if isinstance(packed, ReferenceQuantizedLinear):
            return dequantize(packed.weight)[start:end]
        assert isinstance(packed, ReferenceLinear)
        return packed.weight[start:end].float()

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        if isinstance(packed, ReferenceQuantizedLinear):
            if isinstance(packed.weight, IntegerWeight):
                return integer_linear(x, packed.weight, packed.bias)
            bias = None if packed.bias is None else packed.bias.float()
            return F.linear(x.float(), dequantize(packed.weight), bias).to(x.dtype)
        assert isinstance(packed, ReferenceLinear)
        return F.linear(x, packed.weight, packed.bias)

    def route(self, logits: Tensor, routing: Routing, correction: Tensor | None, lora: LoraSegments | None) -> Routes:
        return route(logits, routing, correction, lora)

    def group_linears(self, experts: Sequence[PackedLinear]) -> ReferenceGroup:
        return ReferenceGroup(experts)

    def grouped_linear(self, x: Tensor, group_starts: Tensor, group: LinearGroup) -> Tensor:
        assert isinstance(group, ReferenceGroup)
        return group.one_by_one(x, group_starts, self.linear)

    def group_lora_tables(self, tables: Sequence[LoraTable]) -> ReferenceLoraTables:
        return ReferenceLoraTables([table for table in tables if isinstance(table, ReferenceLoraTable)])

    def weighted_sums(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return weighted_sums(x, rows, weights)

    def pack_lora(self, weights: LoraWeights) -> ReferenceLora:
        return ReferenceLora(weights)

    def lora_table(self, in_features: int, out_features: int, num_slots: int) -> ReferenceLoraTable:
        return ReferenceLoraTable(in_features, out_features, num_slots)

    def segmented_lora(self, y: Tensor, x: Tensor, segments: LoraSegments, table: LoraTable | LoraTableGroup) -> None:
        assert isinstance(table, ReferenceLoraTable | ReferenceLoraTables)
        for slot, start, end in segments.ranges:
            adapter = table.adapter(slot)
            if adapter is None:
                continue
            shrunk = x[start:end].float() @ adapter.a_t
            rows = y[start:end]
            for ranks, columns, b_t in adapter.slices:
                rows[:, columns] += shrunk[:, ranks] @ b_t
            if adapter.affine is not None:
                gain, offset = adapter.affine.to(y.device)
                rows.copy_(rows.float() * gain + offset)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, eps).to(x.dtype)

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        residual += x
        return self.layer_norm(residual, weight, bias, eps)

    def rotary_store_kv(
        self,
        qkv: Tensor,  # [T, (H + 2K)·D]
        shape: HeadShape,
        qk_norm: QKNorm | None,
        positions: Tensor,  # int64 [T]
        cos_sin: Tensor,  # float32 [max positions, 2, R/2]
        cache: LayerKV,
        slot_mapping: Tensor,  # int64 [T]
        interleaved: bool = False,
    ) -> Tensor:
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if qk_norm is not None:
            q = self.rms_norm(q.float(), qk_norm.q_weight, qk_norm.eps)  # rounds once, after the rotation
            k = self.rms_norm(k.float(), qk_norm.k_weight, qk_norm.eps)
        cos, sin = cos_sin[positions].unsqueeze(2).unbind(1)  # [T, 1, R/2] each
        _store(_rotate(k, cos, sin, interleaved), cache.k, cache.k_scale, slot_mapping)
        _store(v, cache.v, cache.v_scale, slot_mapping)
        return _rotate(q, cos, sin, interleaved).to(qkv.dtype)

    def paged_attention(
        self,
        q: Tensor,  # [T, H, D]
        cache: LayerKV,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: Tensor | None = None,  # float32 [H]
    ) -> Tensor:
        starts = metadata.query_starts.tolist()
        out = torch.empty_like(q)
        positions = metadata.seq_lens.tolist()
        decoding = [s for s in range(len(positions)) if starts[s + 1] - starts[s] == 1]
        for group in _similar_lengths(decoding, positions, cache.k[0, 0].numel()):
            rows = torch.tensor([starts[s] for s in group], device=q.device)
            chosen = torch.tensor(group, device=q.device)
            longest = max(positions[s] for s in group)
            last = metadata.seq_lens[chosen].long().unsqueeze(1) - 1  # [S, 1]
            tables = metadata.block_tables[chosen]
            part = q[rows].unsqueeze(1)
            out[rows] = _attend(part, cache, tables, last, longest, scale, window, soft_cap, sinks).squeeze(1)
        for s, length in enumerate(positions):
            start, end = starts[s], starts[s + 1]
            if end - start < 2:
                continue
            tables = metadata.block_tables[s : s + 1]
            at_once = max(1, MAX_ATTENTION_ELEMENTS // (length * q.shape[1]))
            for first in range(start, end, at_once):
                after = min(first + at_once, end)
                seen = length - end + after  # keys up to the last query of these rows
                at = torch.arange(length - end + first, seen, device=q.device).unsqueeze(0)  # [1, rows]
                part = q[first:after].unsqueeze(0)
                out[first:after] = _attend(part, cache, tables, at, seen, scale, window, soft_cap, sinks).squeeze(0)
        return out.flatten(1)

    def allocate_kv(self, num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype) -> LayerKV:
        size = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        k, v = torch.zeros((2, *size), dtype=dtype, device=self.device)
        if dtype not in QUANTIZED_KV:
            return LayerKV(k, v, num_blocks, block_size)
        k_scale, v_scale = torch.zeros((2, *size[:-1]), device=self.device)
        return LayerKV(k, v, num_blocks, block_size, k_scale, v_scale)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        return F.gelu(x.float(), approximate="tanh").to(x.dtype)

    def xielu(self, x: Tensor, shape: Xielu) -> Tensor:
        wide = x.float()
        below = shape.negative * (torch.expm1(wide.clamp(max=shape.eps)) - wide)
        curve = torch.where(wide > 0, shape.positive * wide * wide, below)
        return (curve + shape.beta * wide).to(x.dtype)


def weighted_sums(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`Ops.weighted_sums`."""
    y = torch.zeros((len(rows), x.shape[1]), device=x.device)
    for choice, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):
        y.addcmul_(x.index_select(0, choice).float(), weight.unsqueeze(1))
    return y.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: [T, heads, D], cos and sin: float32 [T, 1, R/2] → float32 as x"""
    dims = 2 * cos.shape[-1]
    turning, rest = x[..., :dims].float(), x[..., dims:].float()
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def _store(heads: Tensor, stored: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    """Put heads [T, K, D] into the slots of stored [B, P, K, D], and their scales into scales [B, P, K]."""
    if scales is not None:
        scale = heads.float().abs().amax(dim=-1) / QUANTIZED_KV[stored.dtype]
        scales.flatten(0, 1)[slots] = scale
        heads = heads.float() / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
        if stored.dtype is torch.int8:
            heads = heads.round()
    stored.flatten(0, 1)[slots] = heads.to(stored.dtype)


def _similar_lengths(sequences: list[int], lengths: list[int], width: int) -> list[list[int]]:
    """Sequences to gather side by side, padded to the longest, within the bound on temporaries.

    width: elements of the keys of one token.
    """
    groups: list[list[int]] = []
    for s in sorted(sequences, key=lambda s: lengths[s], reverse=True):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] * width <= MAX_ATTENTION_ELEMENTS:
            groups[-1].append(s)
        else:
            groups.append([s])
    return groups


def _attend(
    q: Tensor,  # [S, n, H, D]
    cache: LayerKV,
    tables: Tensor,  # int32 [S, blocks]
    positions: Tensor,  # int64 [S, n]
    num_keys: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,  # [H]
) -> Tensor:
    """n queries of each of S sequences over the first `num_keys` cached positions, masked → [S, n, H, D]"""
    sequences, n, num_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[2]
    tables = tables[:, : -(-num_keys // cache.block_size)]

    def gather(stored: Tensor, scales: Tensor | None) -> Tensor:
        """→ float32 [S, K, L, D]"""
        found = stored[tables].flatten(1, 2)[:, :num_keys].float()
        if scales is not None:
            found *= scales[tables].flatten(1, 2)[:, :num_keys].unsqueeze(-1)
        return found.transpose(1, 2)

    # Query heads that share a kv head sit together: one product [n·H/K, D] x [D, L] for each of them.
    grouped = q.float().view(sequences, n, num_kv_heads, -1, head_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    scores = (grouped @ gather(cache.k, cache.k_scale).transpose(2, 3)) * scale  # [S, K, n·H/K, L]
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    keys = torch.arange(num_keys, device=q.device)
    hidden = keys > positions.unsqueeze(-1)  # [S, n, L]
    if window is not None:
        hidden |= keys <= positions.unsqueeze(-1) - window
    hidden = hidden.repeat_interleave(num_heads // num_kv_heads, dim=1).unsqueeze(1)
    scores.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        of_heads = sinks.float().view(1, num_kv_heads, 1, -1).expand(sequences, -1, n, -1)
        scores = torch.cat((scores, of_heads.reshape(sequences, num_kv_heads, -1, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys]
    attended = weights @ gather(cache.v, cache.v_scale)
    return attended.view(sequences, num_kv_heads, n, -1, head_dim).transpose(1, 2).flatten(2, 3).to(q.dtype)
