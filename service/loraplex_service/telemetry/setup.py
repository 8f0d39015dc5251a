"""The observers that the configuration asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from loraplex_service.telemetry.config import OtlpConfig, UsageConfig
from loraplex_service.telemetry.logs import AccessLog
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.telemetry.records import Observer, Observers
from loraplex_service.telemetry.usage import UsageLog


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The configured observers. `metrics` is part of `observer` in any case, because `loraplex top` shows it."""

    metrics: RequestMetrics
    observer: Observer
    usage: UsageLog | None = None  # also one of those; None: no records are kept


@asynccontextmanager
async def telemetry_of(
    usage_config: UsageConfig | None, otlp_config: OtlpConfig | None, access_log: bool
) -> AsyncIterator[Telemetry]:
    """Set up the observers. Raises OSError for a usage file that cannot be written."""
    async with AsyncExitStack() as stack:
        metrics = RequestMetrics()
        observers: list[Observer] = [metrics]
        usage: UsageLog | None = None
        if usage_config is not None:
            usage = UsageLog(Path(usage_config.file), usage_config.rotate_bytes, usage_config.max_waiting_records)
            stack.push_async_callback(usage.close)
            observers.append(usage)
            trying = asyncio.create_task(usage.keep_trying(), name="usage")
            stack.callback(trying.cancel)
        if access_log:
            observers.append(AccessLog())
        if otlp_config is not None:
            from loraplex_service.telemetry.otlp import OtlpTelemetry  # with it comes the SDK

            otlp = OtlpTelemetry(otlp_config, version("loraplex-server"))
            stack.push_async_callback(asyncio.to_thread, otlp.close)
            sending = asyncio.create_task(otlp.keep_sending(), name="otlp")
            stack.callback(sending.cancel)
            observers.append(otlp)
        yield Telemetry(metrics, Observers(*observers), usage)
