"""The Prometheus page: the counts of RequestMetrics and the last figures of the engines, under our names and vLLM's.

Dashboards, autoscalers and gateways read the `vllm:` names already; each stands for the series beside it in the table.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import VERSION_DIGITS, resource_name
from loraplex_engine.link.messages import EngineStats
from loraplex_service.control.fleet_metrics import fleet_families
from loraplex_service.control.metric_families import counter_family, gauge_family, histogram_family
from loraplex_service.control.metrics_snapshot import EngineSnapshot, ModelSnapshot, Served, Snapshot
from loraplex_service.control.process_metrics import build_families, process_families
from loraplex_service.control.rank_families import rank_families
from loraplex_service.control.router_metrics import router_families
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.telemetry.series import Counter, Histogram

SNAPSHOT_SECONDS = 5.0  # that a scrape waits for the event loop


class MetricsPage(Collector):
    """Renders a snapshot.

    Only taking the snapshot runs on the event loop: a page of thousands of adapters would block it.
    """

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop) -> None:
        self._served = served
        self._loop = loop

    def snapshot(self) -> Snapshot:
        """Have the event loop take a snapshot, and wait for it, in a thread of prometheus_client."""

        async def snapshot() -> Snapshot:
            return self._served.snapshot()

        return asyncio.run_coroutine_threadsafe(snapshot(), self._loop).result(SNAPSHOT_SECONDS)

    def collect(self) -> Iterable[Metric]:
        return families(self.snapshot())

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not wait for the loop that it runs on


class PageRegistry(CollectorRegistry):
    """Serves the page, and parts of it by name."""

    def __init__(self, page: MetricsPage) -> None:
        super().__init__()
        self._page = page
        self.register(page)

    def restricted_registry(self, names: Iterable[str]) -> Any:
        return _Part(self._page, frozenset(name.removesuffix("_total") for name in names))


class _Part(Collector):
    """Families by name. Routers look several times a second, so that what they read does not wait for all the rest."""

    def __init__(self, page: MetricsPage, names: frozenset[str]) -> None:
        self._page = page
        self._names = names

    def collect(self) -> Iterable[Metric]:
        shown = self._page.snapshot()
        found = list(_brief_families(shown))
        if not self._names <= {family.name for family in found}:
            found = list(families(shown))
        return [family for family in found if family.name in self._names]


def families(shown: Snapshot) -> Iterator[Metric]:
    """The metric families of the whole page."""
    yield from _request_families(shown.metrics)
    waiting = [] if shown.usage_waiting is None else [((), shown.usage_waiting)]
    yield gauge_family("loraplex_usage_records_waiting", "Usage records that are not in their file yet.", (), waiting)
    yield from fleet_families(shown.fleet)
    yield from _engine_families(shown.models)
    yield from build_families(shown.models)
    yield from process_families(shown.models)
    yield from _brief_families(shown)


def _brief_families(shown: Snapshot) -> Iterator[Metric]:
    """Those that routers read: they have no row for each adapter that is only on disk, or was ever used."""
    yield gauge_family("loraplex_draining", "1 once the server accepts no new requests.", (), [((), shown.draining)])
    let_in = [((model.name,), float(shown.sequences.get(model.name, 0))) for model in shown.models]
    yield gauge_family(
        "loraplex_in_flight_sequences", "Sequences that were let in and have not ended.", ("model",), let_in
    )
    engines = [(model, model.engine) for model in shown.models if model.engine is not None]
    stats = [(model, engine.stats) for model, engine in engines if engine.stats is not None]
    for name, alias, text, value in _GAUGES:
        values = [((model.name,), value(stats)) for model, stats in stats]
        yield gauge_family(name, text, ("model",), values)
        if alias is not None:
            yield gauge_family(alias, text, ("model_name",), values)
    yield from router_families(shown.models)


@asynccontextmanager
async def metrics_server(page: MetricsPage, address: str) -> AsyncIterator[str]:
    """Serve the page at http://ADDRESS/metrics; yields the address with the port that was taken for port 0.

    Raises OSError if the address cannot be used.
    """
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host.strip("[]"), PageRegistry(page))
    try:
        yield f"{host}:{server.server_port}"
    finally:
        await asyncio.to_thread(server.shutdown)  # a scrape that has begun needs this loop to end
        server.server_close()
        thread.join()


# ---- calls and generations -------------------------------------------------------------------------------------------


def _request_families(metrics: RequestMetrics) -> Iterator[Metric]:
    for prefix, labels, usage in (
        ("loraplex_tenant", ("tenant", "model"), metrics.tenants),
        ("loraplex", ("tenant", "model", "adapter"), metrics.adapters),
    ):
        yield counter_family(f"{prefix}_requests", "Generations that ended.", (*labels, "status"), usage.requests)
        yield counter_family(f"{prefix}_prompt_tokens", "Prompt tokens of generations.", labels, usage.prompt_tokens)
        text = "Prompt tokens of generations found in the prefix cache."
        yield counter_family(f"{prefix}_cached_prompt_tokens", text, labels, usage.cached_prompt_tokens)
        yield counter_family(f"{prefix}_completion_tokens", "Tokens generated.", labels, usage.completion_tokens)
    yield counter_family(
        "vllm:request_success", "Outputs that finished, by reason.", ("model_name", "finished_reason"), metrics.finished
    )
    for name, alias, text, histogram in (
        (
            "loraplex_request_duration_seconds",
            "vllm:e2e_request_latency_seconds",
            "Whole generations.",
            metrics.duration,
        ),
        (
            "loraplex_time_to_first_token_seconds",
            "vllm:time_to_first_token_seconds",
            "From the arrival of a call to its first token.",
            metrics.first_token,
        ),
        (
            "loraplex_inter_token_latency_seconds",
            "vllm:inter_token_latency_seconds",
            "Between two tokens of an output, each time; while generations run.",
            metrics.token_gaps,
        ),
        (
            "loraplex_time_per_output_token_seconds",
            "vllm:request_time_per_output_token_seconds",
            "Mean time between two tokens of a generation.",
            metrics.per_token,
        ),
        (
            "loraplex_queue_seconds",
            "vllm:request_queue_time_seconds",
            "From the arrival of a call to the first step that worked for it.",
            metrics.queue,
        ),
    ):
        yield histogram_family(name, text, ("model",), histogram)
        yield histogram_family(alias, text, ("model_name",), histogram)
    text = "Time that generations waited for an adapter which was not in the engine's memory."
    yield histogram_family("loraplex_adapter_wait_seconds", text, ("model",), metrics.adapter_wait)
    yield from _adapter_loads(metrics.adapter_loads)
    yield histogram_family("loraplex_rpc_duration_seconds", "Calls of any method.", ("method", "status"), metrics.calls)
    text = "Forms that requests, routes and adapters asked for: read, kept from before, or read and refused."
    yield counter_family("loraplex_form_checks", text, ("outcome",), metrics.form_checks)
    text = "Requests of HTTP that were answered."
    yield counter_family("loraplex_http_requests", text, ("endpoint", "status"), metrics.http_requests)
    text = "Delay with which the service's event loop runs a due task: while it is blocked, no caller is served."
    yield histogram_family("loraplex_event_loop_lag_seconds", text, (), metrics.loop_lag)


def _adapter_loads(times: Histogram) -> Iterator[Metric]:
    loads, seconds, by_transition = Counter(), Counter(), Histogram(times.bounds)
    for (model,), taken in times.values.items():
        loads.values[model,] = sum(taken.counts)
        seconds.values[model,] = taken.total
        by_transition.values[model, "load"] = taken
    yield counter_family("loraplex_adapter_loads", "Adapters read into host memory.", ("model",), loads)
    text = "Seconds spent reading adapters into host memory."
    yield counter_family("loraplex_adapter_load_seconds", text, ("model",), seconds)
    text = "Loads of adapters into host memory, from the order to the answer."
    yield histogram_family("vllm:lora_adapter_load_seconds", text, ("model_name", "transition"), by_transition)


# ---- engines ---------------------------------------------------------------------------------------------------------

# our name, vLLM's or none, what it is, its value
_GAUGES: Sequence[tuple[str, str | None, str, Callable[[EngineStats], float]]] = (
    ("loraplex_running_requests", "vllm:num_requests_running", "Sequences that run.", lambda s: s.num_running),
    (
        "loraplex_waiting_requests",
        "vllm:num_requests_waiting",
        "Sequences that wait, for their adapter too.",
        lambda s: s.num_not_running,
    ),
    (
        "loraplex_waiting_for_adapter_requests",
        None,
        "Sequences that wait for their adapter.",
        lambda s: s.num_waiting_for_adapter,
    ),
    (
        "loraplex_kv_cache_usage_ratio",
        "vllm:kv_cache_usage_perc",
        "Share of the key-value cache that running sequences hold, 0 to 1.",
        lambda s: s.used_blocks / max(s.total_blocks, 1),
    ),
    ("loraplex_kv_cache_blocks", None, "Blocks of the key-value cache.", lambda s: s.total_blocks),
    (
        "loraplex_kv_cache_cached_blocks",
        None,
        "Cache blocks that are kept for their prefix.",
        lambda s: s.cached_blocks,
    ),
    (
        "loraplex_host_cache_blocks",
        None,
        "Cache blocks with a copy in host memory.",
        lambda s: s.host_blocks,
    ),
    ("loraplex_host_cache_bytes", None, "Bytes of host memory that these take.", lambda s: s.host_cache_bytes),
    ("loraplex_disk_cache_bytes", None, "Bytes of files with cache blocks.", lambda s: s.disk_cache_bytes),
    (
        "loraplex_adapter_device_bytes",
        None,
        "Bytes that adapters use on the device.",
        lambda s: s.adapter_device_bytes,
    ),
    ("loraplex_adapter_host_bytes", None, "Bytes that adapters use in host memory.", lambda s: s.adapter_host_bytes),
)
_COUNTERS: Sequence[tuple[str, str | None, str, Callable[[EngineStats], float]]] = (
    (
        "loraplex_prefix_cache_queries",
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_cache_queries,
    ),
    (
        "loraplex_prefix_cache_hits",
        "vllm:prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_cache_hits,
    ),
    (
        "loraplex_host_cache_saved_blocks",
        None,
        "Cache blocks copied to host memory when they were evicted.",
        lambda s: s.num_saved_blocks,
    ),
    (
        "loraplex_host_cache_restored_blocks",
        None,
        "Cache blocks copied back to the device for a request.",
        lambda s: s.num_restored_blocks,
    ),
    (
        "loraplex_host_cache_move_seconds",
        None,
        "Time between steps that these copies took in all.",
        lambda s: s.move_seconds,
    ),
    (
        "loraplex_disk_cache_written_blocks",
        None,
        "Cache blocks written to files.",
        lambda s: s.num_blocks_written,
    ),
    (
        "loraplex_disk_cache_read_blocks",
        None,
        "Cache blocks read from files for a request.",
        lambda s: s.num_blocks_read,
    ),
    (
        "loraplex_disk_cache_bad_files",
        None,
        "Files of cache blocks that could not be read, or were not what had been written.",
        lambda s: s.num_bad_files,
    ),
    (
        "loraplex_preemptions",
        "vllm:num_preemptions",
        "Sequences that gave their blocks back to others.",
        lambda s: s.num_preemptions,
    ),
    (
        "loraplex_not_finite_requests",
        None,
        "Sequences that ended because their logits were NaN or infinite.",
        lambda s: s.num_not_finite,
    ),
    ("loraplex_forms", None, "Sequences that were given a form.", lambda s: s.num_forms),
    (
        "loraplex_forms_compiled",
        None,
        "Forms compiled, once for all who ask for the same.",
        lambda s: s.num_forms_compiled,
    ),
    ("loraplex_form_compile_seconds", None, "Time that compiling forms took in all.", lambda s: s.form_seconds),
    ("loraplex_forms_failed", None, "Sequences that ended because of their form.", lambda s: s.num_forms_failed),
    ("loraplex_engine_steps", None, "Steps of the engine.", lambda s: s.num_steps),
    ("loraplex_engine_prompt_tokens", "vllm:prompt_tokens", "Prompt tokens computed.", lambda s: s.prompt_tokens),
    (
        "loraplex_engine_generated_tokens",
        "vllm:generation_tokens",
        "Tokens generated, as the engine counts them while it runs.",
        lambda s: s.generated_tokens,
    ),
    (
        "loraplex_draft_tokens",
        "vllm:spec_decode_num_draft_tokens",
        "Drafts that were checked.",
        lambda s: s.draft_tokens,
    ),
    (
        "loraplex_accepted_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens",
        "Drafts that were right.",
        lambda s: s.accepted_draft_tokens,
    ),
)


def _engine_families(models: Sequence[ModelSnapshot]) -> Iterator[Metric]:
    up = [((model.name,), model.active) for model in models]
    yield gauge_family("loraplex_model_up", "1 while the model serves.", ("model",), up)
    failed = [((model.name,), model.failed) for model in models]
    text = "1 if a model could not be loaded, or not be started again."
    yield gauge_family("loraplex_model_failed", text, ("model",), failed)
    loaded = [((model.name,), model.load_time) for model in models if model.load_time is not None]
    text = "When the engine was last loaded, in seconds since the epoch: it changes with each restart."
    yield gauge_family("loraplex_model_load_time_seconds", text, ("model",), loaded)
    engines = [(model, model.engine) for model in models if model.engine is not None]
    stats = [(model, engine.stats) for model, engine in engines if engine.stats is not None]
    for name, alias, text, value in _COUNTERS:
        counter = Counter()
        counter.values = {(model.name,): value(stats) for model, stats in stats}
        yield counter_family(name, text, ("model",), counter)
        if alias is not None:
            yield counter_family(alias, text, ("model_name",), counter)
    yield from _adapters_by_tier(engines)
    yield _adapter_moves(engines)
    yield _adapter_users(stats)
    yield from rank_families(stats)


def _adapters_by_tier(engines: Sequence[tuple[ModelSnapshot, EngineSnapshot]]) -> Iterator[Metric]:
    """The tier of each adapter version, and the number of versions in each tier."""
    rows, counts = [], []
    for model, engine in engines:
        for key in engine.adapters:
            tier = engine.residency.get(key, Residency.DISK).name.lower()
            rows.append(((model.name, resource_name(key), key.digest[:VERSION_DIGITS], tier), 1.0))
        for where in (Residency.HOST, Residency.DEVICE):
            count = sum(one is where for one in engine.residency.values())
            counts.append(((model.name, where.name.lower()), float(count)))
    text = "1 for each adapter version that an engine has been given, with the tier that it is in."
    yield gauge_family("loraplex_adapter_resident", text, ("model", "adapter", "version", "tier"), rows)
    yield gauge_family("loraplex_adapters", "Adapter versions in each tier.", ("model", "tier"), counts)


def _adapter_moves(engines: Sequence[tuple[ModelSnapshot, EngineSnapshot]]) -> Metric:
    moves = Counter()
    for model, engine in engines:
        for (before, after), count in engine.moves.items():
            moves.add((model.name, before.name.lower(), after.name.lower()), count)
    text = "Adapters that went from one tier to another; away from the device are evictions."
    return counter_family("loraplex_adapter_moves", text, ("model", "from", "to"), moves)


def _adapter_users(stats: Sequence[tuple[ModelSnapshot, EngineStats]]) -> Metric:
    users = Counter()
    for model, last in stats:
        for key, sequences in last.adapters:
            for member in key.members:
                users.add((model.name, resource_name(member), member.digest[:VERSION_DIGITS]), sequences)
    text = "Sequences that use an adapter version on the device."
    return gauge_family("loraplex_adapter_requests", text, ("model", "adapter", "version"), users.values.items())
