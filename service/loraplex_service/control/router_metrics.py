"""The metrics by which routers choose a replica, under vLLM's names: llm-d and the Gateway API's endpoint pickers.

An adapter has the name there that requests have in `model`: its id. Where versions of one are in memory, one series
stands for all: for the one nearest to the device.
"""

from collections.abc import Iterator, Mapping, Sequence
from time import time

from prometheus_client.core import Metric

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.messages import AdapterStatus, EngineStats
from loraplex_service.control.metric_families import gauge_family
from loraplex_service.control.metrics_snapshot import EngineSnapshot, ModelSnapshot
from loraplex_service.telemetry.series import MAX_SERIES

LEVELS = {Residency.DEVICE: "gpu", Residency.HOST: "cpu"}

Engines = Sequence[tuple[ModelSnapshot, EngineSnapshot]]


def router_families(models: Sequence[ModelSnapshot]) -> Iterator[Metric]:
    """The families that routers read, beside those of requests and engines that have a name of vLLM's."""
    engines = [(model, model.engine) for model in models if model.engine is not None]
    stats = [(model, engine.stats) for model, engine in engines if engine.stats is not None]
    yield _loaded(engines)
    yield from _slots(engines)
    yield _with_requests(stats)
    yield _cache_info(stats)


def _loaded(engines: Engines) -> Metric:
    """The adapters in memory; where there are more than the page shows of anything, those nearest to the device."""
    rows: list[tuple[tuple[str, ...], float]] = []
    for model, engine in engines:
        nearest = sorted(_nearest(engine.adapters).items(), key=lambda item: (-item[1].tier, item[0]))
        for name, status in nearest[: MAX_SERIES - len(rows)]:
            rank = "" if status.facts is None else str(status.facts.rank)
            tenant, _, adapter = name.partition("/")
            rows.append(((model.name, tenant, adapter, LEVELS[status.tier], str(status.pinned).lower(), rank), 1.0))
    names = ("model_name", "tenant", "adapter_name", "level", "pinned", "rank")
    return gauge_family("vllm:lora_adapter_loaded", "1 for each adapter in memory, and where it is.", names, rows)


def _slots(engines: Engines) -> Iterator[Metric]:
    used = [((model.name,), float(_num_on_device(engine))) for model, engine in engines]
    text = "Adapters that take a slot on the device."
    yield gauge_family("vllm:num_gpu_loaded_lora_adapters", text, ("model_name",), used)
    slots = [((model.name,), float(model.max_resident_adapters)) for model, _ in engines]
    yield gauge_family("vllm:max_gpu_lora_adapters", "Slots for adapters on the device.", ("model_name",), slots)


def _with_requests(stats: Sequence[tuple[ModelSnapshot, EngineStats]]) -> Metric:
    """As in vLLM, the value is the time, and the newest counts."""
    now = time()
    rows = []
    for model, last in stats:
        running = {_id(member) for key, users in last.adapters if users for member in key.members}
        others = {_id(key) for key, requests in model.adapter_requests if requests} - running
        labels = (str(model.max_resident_adapters), ",".join(sorted(running)), ",".join(sorted(others)))
        rows.append(((model.name, *labels), now))
    names = ("model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters")
    return gauge_family(
        "vllm:lora_requests_info", "Adapters with requests, and how many fit on the device.", names, rows
    )


def _cache_info(stats: Sequence[tuple[ModelSnapshot, EngineStats]]) -> Metric:
    rows = [((model.name, str(last.block_size), str(last.total_blocks)), 1.0) for model, last in stats]
    return gauge_family(
        "vllm:cache_config_info", "Size of the cache.", ("model_name", "block_size", "num_gpu_blocks"), rows
    )


def _nearest(adapters: Mapping[AdapterKey, AdapterStatus]) -> Mapping[str, AdapterStatus]:
    """The adapters in memory, by {tenant}/{adapter}."""
    nearest: dict[str, AdapterStatus] = {}
    for key, status in adapters.items():
        if status.tier in LEVELS and ((known := nearest.get(key.name)) is None or known.tier < status.tier):
            nearest[key.name] = status
    return nearest


def _num_on_device(engine: EngineSnapshot) -> int:
    return sum(status.tier is Residency.DEVICE for status in engine.adapters.values())


def _id(key: AdapterKey) -> str:
    """The adapter's id: its key's name is {tenant}/{adapter}."""
    return key.name.partition("/")[2]
