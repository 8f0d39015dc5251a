"""`Ops` on the CPU, computed by the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.library import VERSION, Library, succeed
from loraplex_kernels.cpu.linear import DTYPE_CODES, CpuLinear, CpuLinearGroup, dtype_code, pack_dense, pack_quantized
from loraplex_kernels.cpu.lora import CpuLora, CpuLoraTable, CpuLoraTables
from loraplex_kernels.cpu.results import ResultMemory
from loraplex_kernels.cpu.sampling import CpuSampling
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
    QKNorm,
    Routes,
    Routing,
    Xielu,
)
from loraplex_kernels.quantized import QuantizedWeight
from loraplex_kernels.routes import route, segments_of

SILU, GELU_TANH = 0, 1
ROUNDED_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}  # of a cache; 0: as the activations
MAX_HEAD_DIM = 1024  # kernels/loraplex_kernels/cpu/attention.h has the same, and the next
CACHE_SLACK = 32  # elements
ALIGNMENT = 64  # bytes: a cache line


class CpuLayerKV(LayerKV):
    """A cache that knows how the compiled functions are told of it: a step asks twice for each layer."""

    @cached_property
    def description(self) -> tuple[int | None, ...]:
        pointers = (None if each is None else each.data_ptr() for each in (self.k, self.v, self.k_scale, self.v_scale))
        return ROUNDED_CODES.get(self.k.dtype, 0), *pointers, block_shift(self.block_size)


class CpuOps(CpuSampling):
    """`Ops` in C++. A row's result is the same bit for bit whatever else is in the step."""

    name = "cpu"
    batch_invariant = True
    packing_copies = True
    own_threads = True
    capturable = False
    lora_growth = 0  # a table is a list of adapters, each as wide as it is

    def __init__(self, device: torch.device, threads: int | None = None, isa: str | None = None) -> None:
        """threads None: one for each core that the process may use. isa None: the best that works here.

        Raises LibraryUnavailableError if the kernels are not compiled, or not for this processor.
        """
        self.device = device
        self.library = Library(threads, isa)
        self.compiled_for = self.library.isa
        self.kv_layout = f"cpu {VERSION} {self.library.isa}"
        self._context = self.library.context
        self._results = ResultMemory(self.library)
        self._segments: LoraSegments | None = None
        self._segment_pointers = (0, 0, 0)

    def pack_linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> CpuLinear:
        return pack_dense(self.library, weights, bias)

    def pack_quantized(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> CpuLinear:
        return pack_quantized(self.library, weight, bias, dtype)

    def dequantize(self, packed: PackedLinear, start: int, end: int) -> Tensor:
        assert isinstance(packed, CpuLinear)
        assert 0 <= start <= end <= packed.out_features
        weight = torch.empty((end - start, packed.in_features), dtype=torch.float32)
        self.library.linear_unpack(packed.handle, weight.data_ptr(), start, end)
        return weight

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        assert isinstance(packed, CpuLinear)
        assert (x.dtype, x.shape[1]) == (packed.dtype, packed.in_features)
        x = x.contiguous()
        rows = x.shape[0]
        y = self._results.empty(x, rows, packed.out_features)
        succeed(self.library.linear(self._context, packed.handle, x.data_ptr(), y.data_ptr(), rows))
        return y

    def route(self, logits: Tensor, routing: Routing, correction: Tensor | None, lora: LoraSegments | None) -> Routes:
        if routing.score not in ("softmax", "sigmoid") or routing.group_best != 2:
            return route(logits, routing, correction, lora)
        logits = logits.contiguous()
        (num_tokens, num_experts), k = logits.shape, routing.per_token
        weights, places = torch.empty(num_tokens, k), torch.empty((num_tokens, k), dtype=torch.int64)
        tokens = torch.empty(num_tokens * k, dtype=torch.int64)
        starts = torch.empty(num_experts + 1, dtype=torch.int64)
        segments = torch.empty((3, 0 if lora is None else num_tokens * k), dtype=torch.int32)
        adapters: tuple[int | None, ...] = (0, None, None, None)
        if lora is not None:
            adapters = len(lora.ranges), lora.slots.data_ptr(), lora.starts.data_ptr(), lora.ends.data_ptr()
        count = self.library.route(
            self._context,
            DTYPE_CODES[logits.dtype],
            logits.data_ptr(),
            None if correction is None else correction.data_ptr(),
            num_tokens,
            num_experts,
            k,
            routing.score == "sigmoid",
            routing.normalised,
            routing.least_sum,
            routing.scale,
            routing.groups,
            routing.groups_kept,
            *adapters,
            *(each.data_ptr() for each in (weights, places, tokens, starts, segments)),
        )
        succeed(count < 0)
        return Routes(weights, places, tokens, starts, None if lora is None else segments_of(segments[:, :count]))

    def group_linears(self, experts: Sequence[PackedLinear]) -> CpuLinearGroup:
        return CpuLinearGroup([expert for expert in experts if isinstance(expert, CpuLinear)])

    def grouped_linear(self, x: Tensor, group_starts: Tensor, group: LinearGroup) -> Tensor:
        assert isinstance(group, CpuLinearGroup)
        assert (x.dtype, x.shape[1]) == (group.dtype, group.in_features)
        x = x.contiguous()
        if not group.alike:
            bounds = pairwise(group_starts.tolist())
            pairs = zip(group.experts, bounds, strict=True)
            return torch.cat([self.linear(x[start:end], expert) for expert, (start, end) in pairs])
        y = self._results.empty(x, x.shape[0], group.out_features)
        rows = group_starts.data_ptr(), x.data_ptr(), y.data_ptr()
        succeed(self.library.grouped_linear(self._context, group.address, len(group.experts), *rows))
        return y

    def group_lora_tables(self, tables: Sequence[LoraTable]) -> CpuLoraTables:
        return CpuLoraTables([table for table in tables if isinstance(table, CpuLoraTable)])

    def weighted_sums(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        assert weights.dtype is torch.float32
        x, rows, weights = x.contiguous(), rows.contiguous(), weights.contiguous()
        y = self._results.empty(x, len(rows), x.shape[1])
        pointers = x.data_ptr(), rows.data_ptr(), weights.data_ptr(), y.data_ptr()
        succeed(self.library.weighted_sums(self._context, DTYPE_CODES[x.dtype], *pointers, *rows.shape, x.shape[1]))
        return y

    def pack_lora(self, weights: LoraWeights) -> CpuLora:
        return CpuLora(self.library, weights)

    def lora_table(self, in_features: int, out_features: int, num_slots: int) -> CpuLoraTable:
        return CpuLoraTable(in_features, out_features, num_slots)

    def segmented_lora(self, y: Tensor, x: Tensor, segments: LoraSegments, table: LoraTable | LoraTableGroup) -> None:
        assert isinstance(table, CpuLoraTable | CpuLoraTables)
        if table.dtype is None:
            return  # nothing was ever here
        assert x.dtype == y.dtype == table.dtype
        assert x.shape[1] == table.in_features
        assert y.shape[1] == table.out_features
        assert y.is_contiguous()
        if segments is not self._segments:  # the same for all linears of a step
            self._segments = segments
            self._segment_pointers = segments.slots.data_ptr(), segments.starts.data_ptr(), segments.ends.data_ptr()
        x = x.contiguous()
        call = self._context, DTYPE_CODES[x.dtype], table.address, table.in_features, table.out_features
        rows = x.data_ptr(), y.data_ptr(), x.shape[0]
        succeed(self.library.lora(*call, *rows, len(segments.ranges), *self._segment_pointers))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        rows, width = x.shape
        out = self._results.empty(x, rows, width)
        call = self._context, DTYPE_CODES[x.dtype], x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps
        succeed(self.library.rms_norm(*call))
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert residual.is_contiguous()
        x = x.contiguous()
        rows, width = x.shape
        out = self._results.empty(x, rows, width)
        call = self._context, DTYPE_CODES[x.dtype], x.data_ptr(), residual.data_ptr(), weight.data_ptr()
        succeed(self.library.add_rms_norm(*call, out.data_ptr(), rows, width, eps))
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return self._layer_norm(x, None, weight, bias, eps)

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        assert residual.is_contiguous()
        return self._layer_norm(x, residual, weight, bias, eps)

    def _layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        x = x.contiguous()
        rows, width = x.shape
        out = self._results.empty(x, rows, width)
        added = None if residual is None else residual.data_ptr()
        call = self._context, DTYPE_CODES[x.dtype], x.data_ptr(), added, weight.data_ptr()
        offset = None if bias is None else bias.data_ptr()
        succeed(self.library.layer_norm(*call, offset, out.data_ptr(), rows, width, eps))
        return out

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
        assert qkv.is_contiguous()
        assert cos_sin.is_contiguous()
        rows = qkv.shape[0]
        q = self._results.empty(qkv, rows, shape.num_heads, shape.head_dim)
        norm: tuple[int | None, int | None, float] = (None, None, 0.0)
        if qk_norm is not None:
            norm = qk_norm.q_weight.data_ptr(), qk_norm.k_weight.data_ptr(), qk_norm.eps
        status = self.library.rotary_store_kv(
            self._context,
            DTYPE_CODES[qkv.dtype],
            qkv.data_ptr(),
            q.data_ptr(),
            rows,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            *norm,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            2 * cos_sin.shape[-1],
            interleaved,
            *described(cache),
            slot_mapping.data_ptr(),
        )
        succeed(status)
        return q

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
        q = q.contiguous()
        rows, heads, head_dim = q.shape
        out = self._results.empty(q, rows, heads * head_dim)
        tables = metadata.block_tables
        status = self.library.paged_attention(
            self._context,
            DTYPE_CODES[q.dtype],
            q.data_ptr(),
            out.data_ptr(),
            heads,
            cache.k.shape[1],
            head_dim,
            *described(cache),
            tables.shape[0],
            metadata.query_starts.data_ptr(),
            metadata.seq_lens.data_ptr(),
            tables.data_ptr(),
            tables.shape[1],
            scale,
            soft_cap or 0.0,
            window or 0,
            None if sinks is None else sinks.data_ptr(),
        )
        succeed(status)
        return out

    def allocate_kv(self, num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype) -> LayerKV:
        """Zeroed tensors [B, K, elements of a block of one head], each block laid out as in attention.h.

        Raises ValueError for a block size that is not a power of two, or a head that is too wide.
        """
        rounded = dtype in QUANTIZED_KV
        code = dtype_code(torch.bfloat16 if rounded else dtype)
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"block size {block_size} is not a power of two")
        if shape.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"the CPU kernels take heads of up to {MAX_HEAD_DIM} dimensions, not {shape.head_dim}")
        head_size = self.library.cache_head_size(code, block_shift(block_size), shape.head_dim)
        size = (num_blocks, shape.num_kv_heads, head_size)
        elements = math.prod(size)
        k, v = (self._zeros(elements + CACHE_SLACK, dtype)[:elements].view(size) for _ in range(2))
        if not rounded:
            return CpuLayerKV(k, v, num_blocks, block_size)
        scales = num_blocks, shape.num_kv_heads, block_size
        k_scale, v_scale = (self._zeros(math.prod(scales), torch.float32).view(scales) for _ in range(2))
        return CpuLayerKV(k, v, num_blocks, block_size, k_scale, v_scale)

    def _zeros(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Zeroed, aligned memory that takes room only once it is written to."""
        num_bytes = elements * dtype.itemsize
        raw = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        self.library.advise_huge_pages(raw.ctypes.data, raw.nbytes)
        return torch.from_numpy(raw[skip : skip + num_bytes]).view(dtype)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._gate(SILU, x)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return self._gate(GELU_TANH, x)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = self._results.empty(x, *x.shape)
        succeed(self.library.gelu_tanh(self._context, DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), *x.shape))
        return out

    def xielu(self, x: Tensor, shape: Xielu) -> Tensor:
        x = x.contiguous()
        out = self._results.empty(x, *x.shape)
        numbers = shape.positive, shape.negative, shape.beta, shape.eps
        call = self._context, DTYPE_CODES[x.dtype], *numbers, x.data_ptr(), out.data_ptr()
        succeed(self.library.xielu(*call, *x.shape))
        return out

    def _gate(self, activation: int, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, width = x.shape
        out = self._results.empty(x, rows, width // 2)
        call = self._context, DTYPE_CODES[x.dtype], activation, x.data_ptr(), out.data_ptr(), rows, width // 2
        succeed(self.library.gate(*call))
        return out


def described(cache: LayerKV) -> tuple[int | None, ...]:
    """The description of a cache for the compiled functions."""
    assert isinstance(cache, CpuLayerKV)
    return cache.description


def block_shift(block_size: int) -> int:
    """The base-2 logarithm of a block size."""
    return block_size.bit_length() - 1
