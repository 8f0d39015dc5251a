"""Metric families as prometheus_client renders them, made of plain numbers."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from loraplex_service.telemetry.series import Counter, Histogram


def gauge_family(name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter_family(name: str, text: str, labels: Sequence[str], counter: Counter) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in counter.values.items():
        family.add_metric(values, value)
    return family


def histogram_family(name: str, text: str, labels: Sequence[str], histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    for values, distribution in histogram.values.items():
        buckets = list(zip(bounds, accumulate(distribution.counts), strict=True))
        family.add_metric(values, buckets, sum_value=distribution.total)
    return family
