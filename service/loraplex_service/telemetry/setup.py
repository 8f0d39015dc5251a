"""The observers that the configuration asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from loraplex_service.config import ServiceConfig
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
async def telemetry_of(config: ServiceConfig) -> AsyncIterator[Telemetry]:
    """Set up the observers. Raises OSError for a usage file that cannot be written."""
    async with AsyncExitStack() as stack:
        metrics = RequestMetrics()
        observers: list[Observer] = [metrics]
        usage: UsageLog | None = None
        if config.usage is not None:
            usage = UsageLog(Path(config.usage.file), config.usage.rotate_bytes, config.usage.max_waiting_records)
            stack.push_async_callback(usage.close)
            observers.append(usage)
            trying = asyncio.create_task(usage.keep_trying(), name="usage")
            stack.callback(trying.cancel)
        if config.access_log:
            observers.append(AccessLog())
        if config.otlp is not None:
            from loraplex_service.telemetry.otlp import OtlpTelemetry  # with it comes the SDK

            otlp = OtlpTelemetry(config.otlp, version("loraplex-server"))
            stack.push_async_callback(asyncio.to_thread, otlp.close)
            sending = asyncio.create_task(otlp.keep_sending(), name="otlp")
            stack.callback(sending.cancel)
            observers.append(otlp)
        yield Telemetry(metrics, Observers(*observers), usage)
