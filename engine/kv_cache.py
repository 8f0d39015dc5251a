"""The cached keys and values of all layers: how much a block takes, and the storage itself."""

from __future__ import annotations

import torch

from engine.model_config import ModelConfig
from kernels.ops import LayerKV, Ops


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers together: a key and a value for each of its tokens."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


def create_kv_cache(
    config: ModelConfig, ops: Ops, num_blocks: int, block_size: int, dtype: torch.dtype
) -> tuple[LayerKV, ...]:
    """Zeroed storage of `num_blocks` blocks for each layer."""
    return tuple(ops.allocate_kv(num_blocks, block_size, config.head_shape, dtype) for _ in config.layers)
