"""What cached blocks are of: two engines with the same identity compute the same blocks, and lay them out alike."""

from __future__ import annotations

from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.config import EngineConfig

# Fields of the configuration that change no block. All others do, or might.
IRRELEVANT = frozenset(
    {
        "threads",
        "device_memory_fraction",
        "kv_cache_bytes",
        "kv_cache_fraction",
        "host_cache_bytes",
        "disk_cache_bytes",
        "disk_cache_directory",
        "max_num_seqs",
        "max_num_batched_tokens",
        "cuda_graphs",
        "run_ahead",
        "drafts",
        "max_adapter_rank",
        "max_resident_adapters",
        "adapter_device_bytes",
        "adapter_host_bytes",
        "adapter_loader_threads",
        "adapter_load_share",
    }
)


def cache_identity(config: EngineConfig, path: Path, runner: ModelRunner) -> bytes:
    """Of a model that was loaded from `path`. Its files count by their names, sizes and times."""
    model, ops = runner.model, runner.ops
    fields = {name: value for name, value in msgspec.to_builtins(config).items() if name not in IRRELEVANT}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    parts = {
        "config": fields,
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "architecture": [model.config.architecture, model.implementation, model.config.quantization],
        "length": runner.max_model_len,  # rotations may be stretched to it
        "types": [str(model.dtype), str(runner.kv_dtype)],
        "parts": [[str(part.dtype), *part.shape[1:]] for layer in runner.kv_cache for part in layer.tensors()],
        "kernels": [ops.name, ops.kv_layout, ops.compiled_for],
        "device": str(ops.device.type),
        "versions": [version("loraplex-server"), str(torch.__version__)],
    }
    return blake2b(msgspec.json.encode(parts), digest_size=32).digest()
