"""ServerService: the server itself, and its load."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from loraplex.v1 import server_pb2_grpc
from loraplex.v1.server_pb2 import (
    Device,
    GetServerInfoRequest,
    ModelLoad,
    ServerInfo,
    TenantLoad,
    UsageRecord,
    UsedAdapter,
    WatchLoadRequest,
    WatchLoadResponse,
    WatchUsageRequest,
    WatchUsageResponse,
)
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import VERSION_DIGITS, resource_name
from loraplex_engine.link.messages import EngineStats
from loraplex_service.call import current_call
from loraplex_service.errors import FeatureUnsupported
from loraplex_service.models.host import HostedModel, ModelHost
from loraplex_service.ports.config import LimitsConfig
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.telemetry.records import GenerationRecord
from loraplex_service.telemetry.series import Labels
from loraplex_service.telemetry.setup import Telemetry
from loraplex_service.telemetry.usage_reader import usage_records
from loraplex_service.timestamps import duration, duration_seconds, timestamp
from loraplex_service.validation.checks import UNSUPPORTED_FIELDS

Context = grpc.aio.ServicerContext[Any, Any]


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Serves figures of the engines' last steps or heartbeats. No method waits for an engine."""

    def __init__(
        self,
        host: ModelHost,
        is_draining: Callable[[], bool],
        telemetry: Telemetry,
        version: str,
        limits: LimitsConfig,
    ) -> None:
        self._host = host
        self._limits = limits
        self._telemetry = telemetry
        self._version = version
        self._is_draining = is_draining
        self._start_time = time.time()
        self.admin_port = 0  # set once it listens

    async def GetServerInfo(self, request: GetServerInfoRequest, context: Context) -> ServerInfo:  # noqa: N802
        return ServerInfo(
            version=self._version,
            start_time=timestamp(self._start_time),
            draining=self._is_draining(),
            devices=_devices(self._host.all()),
            max_receive_bytes=self._limits.request_bytes,
            max_batch_receive_bytes=self._limits.batch_bytes,
            unsupported_features=UNSUPPORTED_FIELDS,
            admin_port=self.admin_port if current_call().manages else 0,
        )

    async def WatchLoad(  # noqa: N802
        self, request: WatchLoadRequest, context: Context
    ) -> AsyncGenerator[WatchLoadResponse, None]:
        interval = duration_seconds(request.interval) if request.HasField("interval") else 1.0
        while True:
            loads = [_load(model, self._telemetry.metrics) for model in self._host.all()]
            yield WatchLoadResponse(
                time=timestamp(time.time()),
                draining=self._is_draining(),
                models=[load for load in loads if load is not None],
                tenants=_tenants(self._telemetry.metrics),
            )
            await asyncio.sleep(interval)

    async def WatchUsage(  # noqa: N802
        self, request: WatchUsageRequest, context: Context
    ) -> AsyncGenerator[WatchUsageResponse, None]:
        if self._telemetry.usage is None:
            raise FeatureUnsupported("WatchUsage", "this server keeps no usage records; set usage.file")
        async with aclosing(usage_records(self._telemetry.usage, request.after_id, request.existing_only)) as batches:
            async for records in batches:
                yield WatchUsageResponse(records=[_usage_message(record) for record in records])


def _load(model: HostedModel, metrics: RequestMetrics) -> ModelLoad | None:
    """The load of a model; None: the model has no engine."""
    if model.client is None:
        return None
    stats = model.client.stats
    if stats is None:
        return ModelLoad(model=f"models/{model.name}")
    load = _stats_message(model, stats, model.client.adapters.residency)
    first, gaps = (histogram.values.get((model.name,)) for histogram in (metrics.first_token, metrics.token_gaps))
    if first is not None:
        load.first_tokens_total = sum(first.counts)
        load.first_token_duration_total.CopyFrom(duration(first.total))
    if gaps is not None:
        load.token_gaps_total = sum(gaps.counts)
        load.token_gap_duration_total.CopyFrom(duration(gaps.total))
    return load


def _stats_message(model: HostedModel, stats: EngineStats, residency: Mapping[AdapterKey, Residency]) -> ModelLoad:
    on_device = [key for key, where in residency.items() if where is Residency.DEVICE]
    return ModelLoad(
        model=f"models/{model.name}",
        running_requests=stats.num_running,
        waiting_requests=stats.num_not_running,
        waiting_for_adapter_requests=stats.num_waiting_for_adapter,
        cache_tokens_total=stats.total_blocks * stats.block_size,
        cache_tokens_used=stats.used_blocks * stats.block_size,
        prefix_lookup_tokens=stats.prefix_cache_queries,
        prefix_hit_tokens=stats.prefix_cache_hits,
        prompt_tokens_total=stats.prompt_tokens,
        completion_tokens_total=stats.generated_tokens,
        adapter_bytes_total=model.config.adapter_device_bytes,
        adapter_bytes_used=stats.adapter_device_bytes,
        device_adapters=[f"{resource_name(key)}@{key.digest[:VERSION_DIGITS]}" for key in on_device],
        host_adapters=sum(where is Residency.HOST for where in residency.values()),
    )


def _tenants(metrics: RequestMetrics) -> list[TenantLoad]:
    loads: dict[str, TenantLoad] = {}

    def load(labels: Labels) -> TenantLoad:
        return loads.setdefault(labels[0], TenantLoad(tenant=f"tenants/{labels[0]}"))

    for labels, count in metrics.tenants.requests.values.items():
        load(labels).requests_total += int(count)
    for labels, tokens in metrics.tenants.prompt_tokens.values.items():
        load(labels).prompt_tokens_total += int(tokens)
    for labels, tokens in metrics.tenants.completion_tokens.values.items():
        load(labels).completion_tokens_total += int(tokens)
    return [loads[tenant] for tenant in sorted(loads)]


def _devices(models: Iterable[HostedModel]) -> list[Device]:
    """The devices of the models, each once. Several models may share one."""
    limits = [model.supervisor.limits for model in models if model.client is not None]
    devices = {one.device.name: one.device for one in limits if one is not None}
    return [
        Device(name=name, description=device.description, memory_bytes=device.memory_bytes)
        for name, device in sorted(devices.items())
    ]


def _usage_message(record: GenerationRecord) -> UsageRecord:
    return UsageRecord(
        id=record.id,
        trace_id=record.trace_id,
        operation=record.operation,
        tenant=f"tenants/{record.tenant}",
        model=record.model,
        model_revision=record.model_revision,
        adapter=record.adapter,
        adapter_digest=record.adapter_digest,
        adapters=[UsedAdapter(adapter=used.name, digest=used.digest, weight=used.weight) for used in record.adapters],
        status=record.status,
        finish_reasons=record.finish_reasons,
        prompt_tokens=record.prompt_tokens,
        cached_prompt_tokens=record.cached_prompt_tokens,
        completion_tokens=record.completion_tokens,
        start_time=timestamp(record.started),
        total_duration=_duration(record.seconds),
        queue_duration=_duration(record.queue_seconds),
        adapter_load_duration=_duration(record.adapter_load_seconds),
        time_to_first_token=_duration(record.first_token_seconds),
        client_request_id=record.client_request_id,
        constraint=record.constraint,
        labels=record.labels,
        draft_tokens=record.draft_tokens,
        accepted_draft_tokens=record.accepted_draft_tokens,
    )


def _duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else duration(seconds)
