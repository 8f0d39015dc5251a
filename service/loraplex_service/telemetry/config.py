"""The parts of the configuration that say what is recorded for billing, and where traces and metrics go."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec

from loraplex_engine.link.bounds import AT_LEAST_1, Bounds


class UsageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One record for each generation, for billing."""

    BOUNDS: ClassVar[dict[str, Bounds]] = {"rotate_bytes": AT_LEAST_1, "max_waiting_records": AT_LEAST_1}

    file: str  # records are appended to it; its directory must exist
    # size at which the file is renamed with a time stamp, and a new one begins. Files are never deleted
    rotate_bytes: int = 64 << 20
    # records that may wait in memory while the file cannot be written; beyond it new generations are refused
    max_waiting_records: int = 10_000

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not Path(self.file).parent.is_dir():
            yield f"there is no directory {Path(self.file).parent}"


class OtlpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The collector of traces and metrics, reached by OTLP over gRPC."""

    BOUNDS: ClassVar[dict[str, Bounds]] = {"trace_ratio": Bounds(1e-6, 1, zero=True)}

    endpoint: str  # `http://host:4317`, or `https:`
    headers: dict[str, str] = {}  # metadata of the exports, such as the collector's credentials
    trace_ratio: float = 1.0  # the share of calls that are traced, where the caller has not decided
    metrics_seconds: float = 15.0  # time between two exports of metrics

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not self.endpoint.startswith(("http://", "https://")):
            yield f"endpoint {self.endpoint!r}: http://host:4317 is expected, or https:"
