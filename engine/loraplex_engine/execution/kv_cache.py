"""The cached keys and values of all layers: the size of a block, and the storage."""

from __future__ import annotations

import torch

from loraplex_engine.models.model import Cached
from loraplex_kernels.ops import LayerKV, Ops

STORED_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def stored_dtype(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The type that `EngineConfig.kv_cache_dtype` names; "auto" is the model's own."""
    return STORED_TYPES.get(kv_cache_dtype, model_dtype)


def block_bytes(model: Cached, ops: Ops, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers together, as this backend lays it out: keys, values, and their scales if any."""
    return model.num_layers * ops.allocate_kv(1, block_size, model.head_shape, dtype).nbytes


def create_kv_cache(
    model: Cached, ops: Ops, num_blocks: int, block_size: int, dtype: torch.dtype
) -> tuple[LayerKV, ...]:
    """Zeroed storage of `num_blocks` blocks for each layer."""
    return tuple(ops.allocate_kv(num_blocks, block_size, model.head_shape, dtype) for _ in range(model.num_layers))
