"""Loads a model onto its device, with a cache of the size that the memory allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from loraplex_engine.execution.device import free_bytes, loading_turn, select_device
from loraplex_engine.execution.kv_cache import block_bytes
from loraplex_engine.execution.memory_profile import cache_budget
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import load_model
from loraplex_kernels.ops import Ops
from loraplex_kernels.selection import select_ops


def load_runner(config: EngineConfig, path: Path, progress: Callable[[int, int], None]) -> ModelRunner:
    """The model in `path`, ready for steps. Raises ValueError if its cache would hold not even one sequence."""
    device = select_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current device
    ops = _select_ops(device, config)
    with loading_turn(device):
        runner = ModelRunner(load_model(config, path, ops, progress), ops, config)
        runner.allocate(_num_blocks(runner, config), config)
        return runner


def _select_ops(device: torch.device, config: EngineConfig) -> Ops:
    ops = select_ops(device, config.kernels, threads=config.threads)
    if ops.own_threads:
        torch.set_num_threads(1)
    if config.batch_invariant and not ops.batch_invariant:
        raise ValueError(
            f"batch_invariant is set, and the {ops.name} kernels cannot promise it: use kernels: cpu, or unset it"
        )
    return ops


def _num_blocks(runner: ModelRunner, config: EngineConfig) -> int:
    """The number of blocks that fit into the memory for the cache."""
    size = block_bytes(runner.model.config, runner.ops, runner.block_size, runner.kv_dtype)
    per_sequence = -(-runner.max_model_len // runner.block_size)
    budget = _cache_bytes(runner, config)
    useful = per_sequence * config.max_num_seqs  # more could never be in use
    num_blocks = min(budget // size, useful)
    if num_blocks < per_sequence:
        remedy = f"raise kv_cache_bytes to {per_sequence * size} or lower max_model_len"
        if config.kv_cache_bytes is None and runner.ops.device.type == "cuda":
            remedy = "raise device_memory_fraction, or lower max_model_len, adapter_device_bytes or max_num_seqs"
        raise ValueError(
            f"kv cache of {budget} bytes holds {budget // size * runner.block_size} tokens, fewer than "
            f"max_model_len = {runner.max_model_len}: {remedy}"
        )
    return num_blocks


def _cache_bytes(runner: ModelRunner, config: EngineConfig) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if runner.ops.device.type == "cuda":
        return cache_budget(runner, config)
    return int(free_bytes(runner.ops.device) * config.kv_cache_fraction)
