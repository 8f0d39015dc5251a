"""The CUDA backend, in Triton: attention, segmented LoRA, products with quantised weights, and the small operations
between. Dense matrix products are cuBLAS's.

The same kernels run on the CPU under Triton's interpreter (TRITON_INTERPRET=1), for tests; on a GPU they have never run
yet. Nothing here reads back from the device: sizes come from shapes and from the host's fields of the metadata.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from loraplex_kernels.draws import Draws, LogitChanges
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
from loraplex_kernels.quantized import IntegerWeight, QuantizedWeight
from loraplex_kernels.reference import ReferenceLinear, weighted_sums
from loraplex_kernels.routes import route
from loraplex_kernels.sampling import TorchSampling
from loraplex_kernels.triton.activation import activate, activate_and_mul
from loraplex_kernels.triton.attention import paged_attention
from loraplex_kernels.triton.attention_tiles import Scoring
from loraplex_kernels.triton.draw import cut_logits, draw_tokens
from loraplex_kernels.triton.grouped import TritonGroup, grouped_linear
from loraplex_kernels.triton.integers import TritonIntegerLinear, integer_linear
from loraplex_kernels.triton.logits import adjust_logits, mask_logits
from loraplex_kernels.triton.lora import segmented_lora
from loraplex_kernels.triton.lora_table import Growth, TritonLora, TritonLoraTable, TritonLoraTables
from loraplex_kernels.triton.norm import norm
from loraplex_kernels.triton.quantized import TritonQuantizedLinear, quantized_linear
from loraplex_kernels.triton.rotary import rotary_store_kv

INTERPRETED_MULTIPROCESSORS = 3  # few: a program costs the interpreter more than what it computes


class TritonOps(TorchSampling):  # of it, the likelihoods: torch finds the largest without a wait
    """`Ops` on a CUDA device.

    A cache block is laid out [K, P, D]: the keys that a program reads at a time lie together.
    """

    name = "triton"
    batch_invariant = False  # cuBLAS and the splitting of sums follow the number of rows
    packing_copies = False
    own_threads = False
    kv_layout = "triton"

    def __init__(self, device: torch.device) -> None:
        """Raises ValueError for a device that Triton does not compile for."""
        if device.type == "cuda":
            self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        elif triton.knobs.runtime.interpret:
            self._num_multiprocessors = INTERPRETED_MULTIPROCESSORS
        else:
            raise ValueError(f"the triton kernels run on CUDA devices, not on {device}: choose another backend")
        self.device = device
        self.compiled_for = "interpreter" if device.type == "cpu" else _capability(device)
        self.capturable = device.type == "cuda"  # not under the interpreter
        self._lora_growth = Growth()

    @property
    def lora_growth(self) -> int:
        return self._lora_growth.count

    def pack_linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> ReferenceLinear:
        return ReferenceLinear(weights[0] if len(weights) == 1 else torch.cat(list(weights)), bias)

    def pack_quantized(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        if isinstance(weight, IntegerWeight):
            return TritonIntegerLinear(weight, bias)
        return TritonQuantizedLinear(weight, bias)

    def dequantize(self, packed: PackedLinear, start: int, end: int) -> Tensor:
        if isinstance(packed, TritonQuantizedLinear | TritonIntegerLinear):
            return packed.dequantize(start, end)
        assert isinstance(packed, ReferenceLinear)
        return packed.weight[start:end].float()

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        if isinstance(packed, TritonQuantizedLinear):
            return quantized_linear(x, packed, self._num_multiprocessors)
        if isinstance(packed, TritonIntegerLinear):
            return integer_linear(x, packed)
        assert isinstance(packed, ReferenceLinear)
        return F.linear(x, packed.weight, packed.bias)

    def route(self, logits: Tensor, routing: Routing, correction: Tensor | None, lora: LoraSegments | None) -> Routes:
        return route(logits, routing, correction, lora)

    def group_linears(self, experts: Sequence[PackedLinear]) -> TritonGroup:
        return TritonGroup(experts, self.device)

    def grouped_linear(self, x: Tensor, group_starts: Tensor, group: LinearGroup) -> Tensor:
        assert isinstance(group, TritonGroup)
        if group.weights is None:
            return group.one_by_one(x, group_starts, self.linear)
        return grouped_linear(x, group_starts, group)

    def group_lora_tables(self, tables: Sequence[LoraTable]) -> TritonLoraTables:
        return TritonLoraTables([table for table in tables if isinstance(table, TritonLoraTable)])

    def weighted_sums(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return weighted_sums(x, rows, weights)

    def pack_lora(self, weights: LoraWeights) -> TritonLora:
        return TritonLora(weights, self.device)

    def lora_table(self, in_features: int, out_features: int, num_slots: int) -> TritonLoraTable:
        return TritonLoraTable(in_features, out_features, num_slots, self.device, self._lora_growth)

    def segmented_lora(self, y: Tensor, x: Tensor, segments: LoraSegments, table: LoraTable | LoraTableGroup) -> None:
        assert isinstance(table, TritonLoraTable | TritonLoraTables)
        segmented_lora(y, x, segments, table, self._num_multiprocessors)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(x, None, weight, None, eps, centred=False)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(x, residual, weight, None, eps, centred=False)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return norm(x, None, weight, bias, eps, centred=True)

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return norm(x, residual, weight, bias, eps, centred=True)

    def rotary_store_kv(
        self,
        qkv: Tensor,  # [T, (H + 2K)·D]
        shape: HeadShape,
        qk_norm: QKNorm | None,
        positions: Tensor,  # int64 [T]
        cos_sin: Tensor,  # float32 [max positions, 2, R/2]
        cache: LayerKV,
        slot_mapping: Tensor,  # int64 [T]; a negative slot stores nothing
        interleaved: bool = False,
    ) -> Tensor:
        return rotary_store_kv(qkv, shape, qk_norm, positions, cos_sin, cache, slot_mapping, interleaved)

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
        return paged_attention(q, cache, metadata, Scoring(scale, window, soft_cap, sinks), self._num_multiprocessors)

    def allocate_kv(self, num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype) -> LayerKV:
        size = (num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
        k, v = torch.zeros((2, *size), dtype=dtype, device=self.device)
        if dtype not in QUANTIZED_KV:
            return LayerKV(k, v, num_blocks, block_size)
        k_scale, v_scale = torch.zeros((2, *size[:-1]), device=self.device)
        return LayerKV(k, v, num_blocks, block_size, k_scale, v_scale)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return activate_and_mul(x, gelu=False)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return activate_and_mul(x, gelu=True)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        return activate(x, None)

    def xielu(self, x: Tensor, shape: Xielu) -> Tensor:
        return activate(x, shape)

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        mask_logits(logits, np.array(rows, dtype=np.int64), bits.numpy(), self.device)

    def adjust_logits(self, logits: Tensor, changes: LogitChanges) -> None:
        adjust_logits(logits, changes, self.device)

    def draw_tokens(self, logits: Tensor, draws: Draws) -> Tensor:
        return draw_tokens(logits, draws, self.device)

    def cut_logits(self, logits: Tensor, draws: Draws) -> None:
        cut_logits(logits, draws, self.device)


def _capability(device: torch.device) -> str:
    """Of a GPU, as its compilers call it: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
