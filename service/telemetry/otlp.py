"""Traces and metrics of OpenTelemetry, sent to a collector by OTLP over gRPC.

A span for each call, whose parent is the caller's, and in it one for each of its generations; names and attributes are
those of the RPC and GenAI semantic conventions. Only imported where an endpoint is configured: importing the SDK takes
long. Its threads do the sending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Histogram
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.config import OtlpConfig
from service.telemetry.records import CallRecord, GenerationRecord
from service.telemetry.series import LATENCY_BUCKETS, TOKEN_BUCKETS

if TYPE_CHECKING:
    from service.interceptors import Call

EXPORT_SECONDS: Final = 5  # that one export may take
PROVIDER: Final = "loraplex"
USAGE_BUCKETS: Final = tuple(float(4**exponent) for exponent in range(14))  # tokens; the convention's own

# Statuses that are the server's fault, by the conventions for RPC server spans.
SERVER_ERRORS: Final = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)

Attributes = dict[str, str | int | float | list[str]]


class OtlpTelemetry:
    """An observer that makes spans and measurements."""

    def __init__(self, config: OtlpConfig, version: str) -> None:
        resource = Resource.create({"service.name": "loraplex", "service.version": version})
        insecure = config.endpoint.startswith("http://")
        headers = tuple(config.headers.items())
        self._tracers = TracerProvider(
            resource=resource, sampler=ParentBased(TraceIdRatioBased(config.trace_ratio)), shutdown_on_exit=False
        )
        spans = OTLPSpanExporter(config.endpoint, insecure, headers=headers, timeout=EXPORT_SECONDS)
        self._tracers.add_span_processor(BatchSpanProcessor(spans))
        metrics = OTLPMetricExporter(config.endpoint, insecure, headers=headers, timeout=EXPORT_SECONDS)
        reader = PeriodicExportingMetricReader(metrics, 1000 * config.metrics_seconds, 1000 * EXPORT_SECONDS)
        self._meters = MeterProvider([reader], resource, shutdown_on_exit=False)
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = self._tracers.get_tracer("loraplex", version)
        meter = self._meters.get_meter("loraplex", version)

        def histogram(name: str, text: str, bounds: tuple[float, ...] = LATENCY_BUCKETS, unit: str = "s") -> Histogram:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=bounds)

        self._calls = histogram("rpc.server.call.duration", "Calls of any method")
        self._duration = histogram("gen_ai.server.request.duration", "Whole generations")
        self._first_token = histogram("gen_ai.server.time_to_first_token", "From the call to its first token")
        self._per_token = histogram("gen_ai.server.time_per_output_token", "Mean time between tokens", TOKEN_BUCKETS)
        self._usage = histogram("gen_ai.client.token.usage", "Tokens of a generation", USAGE_BUCKETS, "{token}")

    def close(self) -> None:
        """Send what has gathered. Takes as long as the collector lets it, seconds if it does not answer."""
        self._tracers.shutdown()
        self._meters.shutdown(1000 * EXPORT_SECONDS)

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        span = self._tracer.start_span(
            method,
            self._propagator.extract(metadata),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method, "loraplex.request_id": call.request_id},
        )
        call.span = span
        call.trace_id = f"{span.get_span_context().trace_id:032x}"

    def call_ended(self, call: Call, record: CallRecord) -> None:
        attributes: Attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": record.method,
            "rpc.response.status_code": record.status,
        }
        self._calls.record(record.seconds, attributes | _error_type(record.status))
        assert isinstance(call.span, Span)
        call.span.set_attributes(attributes | _error_type(record.status) | {"loraplex.tenant": call.tenant})
        if record.status in SERVER_ERRORS:
            call.span.set_status(StatusCode.ERROR)
        call.span.end()

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        attributes: Attributes = {
            "gen_ai.operation.name": record.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": record.adapter or record.model,
            "gen_ai.response.model": record.model,
        }
        attributes |= _error_type(record.status)
        self._duration.record(record.seconds, attributes)
        if record.first_token_seconds is not None:
            self._first_token.record(record.first_token_seconds, attributes)
        if record.seconds_per_token is not None:
            self._per_token.record(record.seconds_per_token, attributes)
        self._usage.record(record.prompt_tokens, attributes | {"gen_ai.token.type": "input"})
        self._usage.record(record.completion_tokens, attributes | {"gen_ai.token.type": "output"})
        self._add_span(call, record, attributes)

    def _add_span(self, call: Call, record: GenerationRecord, attributes: Attributes) -> None:
        assert isinstance(call.span, Span)
        if not call.span.is_recording():
            return
        began = round(1e9 * record.started)
        span = self._tracer.start_span(
            f"{record.operation} {record.adapter or record.model}",
            set_span_in_context(call.span),
            SpanKind.INTERNAL,
            attributes | _span_attributes(record),
            start_time=began,
        )
        if record.queue_seconds is not None:
            span.add_event("scheduled", timestamp=began + round(1e9 * record.queue_seconds))
        if record.first_token_seconds is not None:
            span.add_event("first_token", timestamp=began + round(1e9 * record.first_token_seconds))
        if record.status in SERVER_ERRORS:
            span.set_status(StatusCode.ERROR)
        span.end(began + round(1e9 * record.seconds))


def _span_attributes(record: GenerationRecord) -> Attributes:
    return {
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": [reason.lower() for reason in record.finish_reasons],
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "loraplex.tenant": record.tenant,
        "loraplex.model_revision": record.model_revision,
        "loraplex.adapter_digest": record.adapter_digest,
        "loraplex.adapter_load_seconds": record.adapter_load_seconds,
    }


def _error_type(status: str) -> Attributes:
    return {} if status == "OK" else {"error.type": status}
