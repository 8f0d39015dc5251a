"""Before a model is loaded: its engine says what it needs, and the service which device it gets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import torch

from loraplex_engine.checkpoint.config_source import config_file
from loraplex_engine.checkpoint.hub import resolve_model
from loraplex_engine.execution.device import free_bytes
from loraplex_engine.execution.sizing import needs_of
from loraplex_engine.link.bus import EngineBus
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.host_memory import total_bytes
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.messages import EngineSized, LoadOn
from loraplex_engine.link.sizes import HOST, DeviceMemory, Needs, readable

MOST_BYTES = 1 << 60


def placed(config: EngineConfig, bus: EngineBus, report: LoadReport) -> EngineConfig:
    """The configuration with the device and the share of it that the service gives this model.

    Waits for the answer: the service may wait for the sizes of other models. Raises ValueError or OSError as loading
    does, where the files cannot be read.
    """
    path = resolve_model(config.model, config.revision, report)
    needs = _all_needs(config, path, report)
    if needs.least(HOST) > MOST_BYTES:
        raise ValueError(
            f"{config_file(path)}: by its sizes the model takes {readable(needs.least(HOST))}, which no machine has: "
            "fetch the file again"
        )
    bus.send(EngineSized(needs, devices()))
    (answer,) = bus.receive(None)
    assert isinstance(answer, LoadOn), f"{type(answer).__name__} before LoadOn"
    for device, ranks in Counter(answer.devices).items():
        check_free(needs, device, free_bytes(torch.device(device)), ranks)
    share = "kv_cache_fraction" if HOST in answer.devices else "device_memory_fraction"
    where = {"device": answer.devices[0]} if config.world == 1 else {"device": "auto", "devices": (*answer.devices,)}
    # Other machines fetch a model of the hub by its own name.
    found = {"model": str(path), "revision": None} if config.machines == 1 else {}
    changes: dict[str, Any] = {"devices": (), share: answer.fraction} | found | where
    return msgspec.structs.replace(config, **changes)


def check_free(needs: Needs, device: str, free: int, ranks: int = 1) -> None:
    """Raise ValueError where others have taken the memory that these ranks of the model need."""
    least = needs.least(device, ranks)
    if least > free:
        raise ValueError(
            f"it needs {readable(least)} of {device} at least ({needs.listed(device, ranks)}), and "
            f"{readable(free)} are free there: end what else holds memory, quantise the model, or lower max_model_len, "
            "max_num_batched_tokens or adapter_device_bytes"
        )


def _all_needs(config: EngineConfig, path: Path, report: LoadReport) -> Needs:
    """Of the model, and of the small one that drafts for it: their caches have as many blocks."""
    needs, small = needs_of(config, path), config.drafting()
    if small is None:
        return needs
    beside = needs_of(small, resolve_model(small.model, small.revision, report))
    cache = needs.cache if config.kv_cache_bytes is not None else needs.cache + beside.cache
    return Needs(needs.weights + beside.weights, cache, max(needs.step, beside.step), needs.adapters, needs.host_cache)


def devices() -> list[DeviceMemory]:
    """The host, and the GPUs that torch sees."""
    gpus = (torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return [
        DeviceMemory(HOST, total_bytes()),
        *(DeviceMemory(f"cuda:{index}", memory) for index, memory in enumerate(gpus)),
    ]
