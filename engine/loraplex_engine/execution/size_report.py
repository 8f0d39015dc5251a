"""What a loaded model takes of its device and what fits into it, for the log: a block that is read at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.execution.sizing import USUAL_RANK, adapter_bytes, step_bytes
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.sizes import readable


def size_report(runners: Sequence[ModelRunner], config: EngineConfig) -> str:
    """A line for each part. runners: the model's, and that of the small model that drafts, if there is one."""
    runner, limits = runners[0], [each.limits(config) for each in runners]
    model, device, targets = runner.model, limits[0].device, runner.model.lora_targets()
    tokens = runner.num_blocks * runner.block_size
    rank = min(USUAL_RANK, config.max_adapter_rank)
    each = max(1, adapter_bytes(targets, rank, model.dtype))
    on_device = min(config.adapter_device_bytes // each, config.max_resident_adapters)
    longest = min(tokens // runner.max_model_len, config.max_num_seqs)
    rows = {
        "weights": (sum(one.weight_bytes for one in limits), ""),
        "cache": (
            sum(one.kv_cache_bytes for one in limits),
            f"{tokens} tokens: {longest} requests of {runner.max_model_len} (max_model_len) at once, "
            f"{config.max_num_seqs} shorter ones at most",
        ),
        "adapters, device": (config.adapter_device_bytes, f"at most: {on_device} of rank {rank} on every linear"),
        "adapters, host": (config.adapter_host_bytes, f"at most: {config.adapter_host_bytes // each} of rank {rank}"),
        "cache, host": (config.host_cache_bytes, "of blocks that the cache has no room for"),
        "one adapter": (each, f"of rank {rank} on every linear"),
        "a step": (step_bytes(model.config, targets, config, model.dtype), "about, the largest"),
    }
    lines = (f"  {name:<17}{readable(size):>11}  {text}".rstrip() for name, (size, text) in rows.items() if size)
    ranks = "" if config.world == 1 else f" of each of {config.world} ranks"
    if config.pipeline_parallel > 1:
        ranks += f", the first of {config.pipeline_parallel} stages"
    return "\n".join([f"sizes{ranks} on {device.name}, which has {readable(device.memory_bytes)}:", *lines])
