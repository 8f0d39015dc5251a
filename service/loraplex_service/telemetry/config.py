"""The parts of the configuration that say what is recorded for billing, and where traces and metrics go."""

from collections.abc import Iterator
from pathlib import Path

import msgspec


class UsageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One record for each generation, for billing."""

    file: str  # records are appended to it, one JSON object a line
    rotate_bytes: int = 64 << 20  # beyond it the file is renamed with a time stamp, and a new one begins
    max_waiting_records: int = 10_000  # kept while the file cannot be written; beyond it requests are refused

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not Path(self.file).parent.is_dir():
            yield f"there is no directory {Path(self.file).parent}"
        if self.rotate_bytes < 1:
            yield f"rotate_bytes {self.rotate_bytes} must be at least 1"
        if self.max_waiting_records < 1:
            yield f"max_waiting_records {self.max_waiting_records} must be at least 1"


class OtlpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The collector of traces and metrics, reached by OTLP over gRPC."""

    endpoint: str  # http://host:4317, or https:
    headers: dict[str, str] = {}  # headers, such as the collector's credentials
    trace_ratio: float = 1.0  # share of calls to trace, where the caller has not decided
    metrics_seconds: float = 15.0  # between two exports

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not self.endpoint.startswith(("http://", "https://")):
            yield f"endpoint {self.endpoint!r}: http://host:4317 is expected, or https:"
        if self.trace_ratio > 1.0:
            yield f"trace_ratio {self.trace_ratio} must be from 0 to 1"
