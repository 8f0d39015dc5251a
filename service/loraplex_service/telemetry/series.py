"""Counters and histograms by label values, as numbers in dictionaries; other files render them.

The classes of prometheus_client allow only one name a metric, and several of ours have two.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from time import time_ns
from typing import Any, Self

MAX_SERIES = 10_000  # of one metric: callers name tenants, and must not fill the memory with them
OTHER = "other"  # stands for every label value that came after these

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

Labels = tuple[str, ...]


class Counter:
    """Numbers that only grow, by label values."""

    def __init__(self) -> None:
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        labels = _admitted(labels, self.values)
        self.values[labels] = self.values.get(labels, 0) + amount

    def drop(self, is_gone: Callable[[Labels], bool]) -> None:
        """Forget the series whose labels are gone."""
        _drop(self.values, is_gone)

    def __deepcopy__(self, memo: object) -> Self:
        """Labels and numbers do not change, so that a flat copy, which is much faster, is a deep one."""
        counter = copy(self)
        counter.values = self.values.copy()
        return counter


class Distribution:
    """How many values fell below each bound (each counted once, in the first bucket that holds it), and their sum."""

    __slots__ = ("_bounds", "counts", "start", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.start = time_ns()  # since the epoch
        self._bounds = bounds

    def observe(self, value: float, count: int = 1) -> None:
        """Observe a value, `count` times."""
        self.counts[bisect_left(self._bounds, value)] += count
        self.total += value * count

    def __deepcopy__(self, memo: object) -> Self:
        distribution = copy(self)
        distribution.counts = self.counts.copy()
        return distribution


@dataclass(slots=True)
class Histogram:
    """Distributions, of seconds unless the bounds say otherwise, by label values."""

    bounds: Sequence[float] = LATENCY_BUCKETS
    values: dict[Labels, Distribution] = field(default_factory=dict)

    def observe(self, labels: Labels, value: float) -> None:
        self.of(labels).observe(value)

    def of(self, labels: Labels) -> Distribution:
        """The distribution with these labels, for callers that observe often."""
        labels = _admitted(labels, self.values)
        distribution = self.values.get(labels)
        if distribution is None:
            distribution = self.values[labels] = Distribution(self.bounds)
        return distribution

    def drop(self, is_gone: Callable[[Labels], bool]) -> None:
        """Forget the series whose labels are gone."""
        _drop(self.values, is_gone)


def _admitted(labels: Labels, known: Mapping[Labels, Any]) -> Labels:
    if labels in known:
        return labels
    other = (OTHER,) * len(labels)
    return labels if len(known) < MAX_SERIES + (other in known) else other


def _drop(values: dict[Labels, Any], is_gone: Callable[[Labels], bool]) -> None:
    for labels in [labels for labels in values if is_gone(labels)]:
        del values[labels]
