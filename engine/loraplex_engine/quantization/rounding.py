"""Quantises a dense matrix while it is loaded, without calibration: each weight becomes the nearest code."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loraplex_engine.quantization.bitsandbytes import INT8_HIGHEST, centred_int8
from loraplex_kernels.quantized import AffineWeight, QuantizedWeight, TableWeight, concatenate

CHUNK_ELEMENTS = 1 << 17
NF4_BLOCK = 64
INT4_GROUP = 64
# Quantiles of the normal distribution, from QLoRA (arXiv 2305.14314), appendix E; as bitsandbytes has them.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def round_to_nearest(weight: Tensor, method: str) -> QuantizedWeight:
    """weight: [N, C] of any float type; method: "nf4", "int8" or "int4", as EngineConfig has it."""
    methods: Mapping[str, Callable[[Tensor], QuantizedWeight]] = {"nf4": _nf4, "int8": _int8, "int4": _int4}
    quantise = methods[method]
    rows, columns = weight.shape
    # Bounds the float32 temporaries. Whole blocks of nf4 lie in any multiple of 64 rows.
    at_once = max(1, CHUNK_ELEMENTS // columns // NF4_BLOCK) * NF4_BLOCK
    record = concatenate([quantise(weight[start : start + at_once]) for start in range(0, rows, at_once)])
    assert record is not None
    return record


def _nf4(weight: Tensor) -> TableWeight:
    """Round to nf4 as bitsandbytes does without double quantisation: blocks of 64 in row order may span rows."""
    table = torch.tensor(NF4_TABLE, device=weight.device)
    between = (table[1:] + table[:-1]) / 2
    values = weight.flatten().float()
    padding = -values.numel() % NF4_BLOCK
    blocks = torch.nn.functional.pad(values, (0, padding)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal().unsqueeze(1)
    codes = torch.bucketize(scaled, between, out_int32=True).to(torch.uint8)
    return TableWeight(codes.flatten()[: values.numel()].view_as(weight), table, absmax, NF4_BLOCK)


def _int8(weight: Tensor) -> AffineWeight:
    """Rows scaled to ±127, as LLM.int8() does (arXiv 2208.07339)."""
    values = weight.float()
    scale = values.abs().amax(dim=1) / INT8_HIGHEST
    inverse = torch.where(scale > 0, scale, 1.0).reciprocal()
    return centred_int8(torch.round(values * inverse.unsqueeze(1)).to(torch.int8), scale)


def _int4(weight: Tensor) -> AffineWeight:
    """Groups of 64 input features from their lowest to their highest weight, 0 included, in 16 steps."""
    rows, columns = weight.shape
    values = torch.nn.functional.pad(weight.float(), (0, -columns % INT4_GROUP)).view(rows, -1, INT4_GROUP)
    low, high = values.amin(dim=2).clamp(max=0), values.amax(dim=2).clamp(min=0)
    scale = ((high - low) / 15).half().float()  # 16 bits are enough, and what kernels like to read
    scale = torch.where(scale > 0, scale, 1.0)
    zero = torch.round(-low / scale).clamp(0, 15)
    codes = torch.round(values / scale.unsqueeze(2) + zero.unsqueeze(2)).clamp(0, 15).to(torch.uint8)
    codes = codes.flatten(1)[:, :columns].contiguous()
    return AffineWeight(codes, 4, scale.t().contiguous(), zero.t().contiguous(), INT4_GROUP)
