"""The observers that the configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.config import ServiceConfig
from service.telemetry.metrics import RequestMetrics
from service.telemetry.records import Observer, Observers
from service.telemetry.usage import UsageLog


@dataclass(frozen=True, slots=True)
class Telemetry:
    """`metrics` is one of those that `observer` is made of, and counts in any case: `loraplex top` shows it too."""

    metrics: RequestMetrics
    observer: Observer


@contextmanager
def telemetry_of(config: ServiceConfig) -> Iterator[Telemetry]:
    """Raises OSError for a usage file that cannot be written."""
    with ExitStack() as stack:
        metrics = RequestMetrics()
        observers: list[Observer] = [metrics]
        if config.usage is not None:
            usage = UsageLog(Path(config.usage.file), config.usage.rotate_bytes)
            observers.append(stack.enter_context(closing(usage)))
        yield Telemetry(metrics, Observers(*observers))
