"""Histograms in the form of OTLP.

The SDK's own instruments would cost seven times as much a value, and would not bound how many series callers can make.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramPoints
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from loraplex_service.telemetry.series import Histogram


class _Instrument(NamedTuple):
    name: str
    unit: str
    description: str
    attributes: tuple[str, ...]  # what the labels of its series are called
    series: Histogram


class OtlpMetrics:
    """Histograms for an exporter. Their data is cumulative: an export that fails loses nothing."""

    def __init__(self, resource: Resource, scope: InstrumentationScope) -> None:
        self._resource = resource
        self._scope = scope
        self._instruments: list[_Instrument] = []

    def add(self, name: str, unit: str, description: str, attributes: tuple[str, ...], series: Histogram) -> Histogram:
        """Export this histogram. `attributes`: a name for each of its labels; an empty label yields no attribute."""
        self._instruments.append(_Instrument(name, unit, description, attributes, series))
        return series

    def data(self) -> MetricsData:
        """All that was observed so far."""
        now = time.time_ns()
        metrics = [self._metric(instrument, now) for instrument in self._instruments if instrument.series.values]
        scope = ScopeMetrics(self._scope, metrics, "")
        return MetricsData([ResourceMetrics(self._resource, [scope], "")])

    def _metric(self, instrument: _Instrument, now: int) -> Metric:
        points = [
            HistogramDataPoint(
                attributes={name: value for name, value in zip(instrument.attributes, labels, strict=True) if value},
                start_time_unix_nano=distribution.start,
                time_unix_nano=now,
                count=sum(distribution.counts),
                sum=distribution.total,
                bucket_counts=tuple(distribution.counts),
                explicit_bounds=instrument.series.bounds,
                min=None,  # type: ignore[arg-type]  # optional in OTLP, and not kept
                max=None,  # type: ignore[arg-type]
            )
            for labels, distribution in instrument.series.values.items()
        ]
        data = HistogramPoints(points, AggregationTemporality.CUMULATIVE)
        return Metric(instrument.name, instrument.description, instrument.unit, data)
