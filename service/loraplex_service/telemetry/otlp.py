"""Traces and metrics of OpenTelemetry, sent to a collector by OTLP over gRPC.

A span for each call, whose parent is the caller's, and in it one for each of its generations; names and attributes are
those of the RPC and GenAI semantic conventions. Only imported where an endpoint is configured: importing the SDK takes
long. Threads do the sending.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loraplex_service.call import Call
from loraplex_service.telemetry.config import OtlpConfig
from loraplex_service.telemetry.otlp_metrics import OtlpMetrics
from loraplex_service.telemetry.records import CallRecord, GenerationRecord
from loraplex_service.telemetry.series import LATENCY_BUCKETS, TOKEN_BUCKETS, Histogram, Labels

EXPORT_SECONDS: Final = 5  # that one export may take
PROVIDER: Final = "loraplex"
CALL: Final = ("rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type")
GENERATION: Final = (
    "gen_ai.operation.name",
    "gen_ai.provider.name",
    "gen_ai.request.model",
    "gen_ai.response.model",
    "error.type",
)
SUM: Final = " + "  # between the adapters of a weighted sum
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
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = self._tracers.get_tracer("loraplex", version)
        self._metrics = OtlpMetrics(resource, InstrumentationScope("loraplex", version))
        self._metrics_seconds = config.metrics_seconds
        self._exporter = OTLPMetricExporter(config.endpoint, insecure, headers=headers, timeout=EXPORT_SECONDS)

        def seconds(
            name: str, text: str, attributes: tuple[str, ...] = GENERATION, bounds: Sequence[float] = LATENCY_BUCKETS
        ) -> Histogram:
            return self._metrics.add(name, "s", text, attributes, Histogram(bounds))

        self._calls = seconds("rpc.server.call.duration", "Calls of any method", CALL)
        self._duration = seconds("gen_ai.server.request.duration", "Whole generations")
        self._first_token = seconds("gen_ai.server.time_to_first_token", "From the call to its first token")
        self._per_token = seconds(
            "gen_ai.server.time_per_output_token", "Mean time between tokens", bounds=TOKEN_BUCKETS
        )
        self._usage = self._metrics.add(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of a generation",
            (*GENERATION, "gen_ai.token.type"),
            Histogram(USAGE_BUCKETS),
        )

    async def keep_sending(self) -> None:
        """Send the metrics at intervals. Never returns."""
        while True:
            await asyncio.sleep(self._metrics_seconds)
            await asyncio.to_thread(self._exporter.export, self._metrics.data())

    def close(self) -> None:
        """Send what has gathered. Takes seconds if the collector does not answer."""
        self._tracers.shutdown()
        self._exporter.export(self._metrics.data())
        self._exporter.shutdown()

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
        self._calls.observe(("grpc", record.method, record.status, _error_type(record.status)), record.seconds)
        assert isinstance(call.span, Span)
        attributes = {
            "rpc.response.status_code": record.status,
            "error.type": _error_type(record.status),
            "loraplex.tenant": call.tenant,
            "loraplex.client_request_id": call.client_request_id,
        }
        call.span.set_attributes({name: value for name, value in attributes.items() if value})
        if record.status in SERVER_ERRORS:
            call.span.set_status(StatusCode.ERROR)
        call.span.end()

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        labels = (record.operation, PROVIDER, _requested(record), record.model, _error_type(record.status))
        self._duration.observe(labels, record.seconds)
        if record.first_token_seconds is not None:
            self._first_token.observe(labels, record.first_token_seconds)
        if record.seconds_per_token is not None:
            self._per_token.observe(labels, record.seconds_per_token)
        self._usage.observe((*labels, "input"), record.prompt_tokens)
        self._usage.observe((*labels, "output"), record.completion_tokens)
        self._add_span(call, record, labels)

    def adapter_removed(self, name: str) -> None:
        requested = GENERATION.index("gen_ai.request.model")
        for series in (self._duration, self._first_token, self._per_token, self._usage):
            series.drop(lambda labels: name in labels[requested].split(SUM))

    def _add_span(self, call: Call, record: GenerationRecord, labels: Labels) -> None:
        assert isinstance(call.span, Span)
        if not call.span.is_recording():
            return
        began = round(1e9 * record.started)
        span = self._tracer.start_span(
            f"{record.operation} {_requested(record)}",
            set_span_in_context(call.span),
            SpanKind.INTERNAL,
            _span_attributes(record) | {name: value for name, value in zip(GENERATION, labels, strict=True) if value},
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
        "loraplex.draft_tokens": record.draft_tokens,
        "loraplex.accepted_draft_tokens": record.accepted_draft_tokens,
        "loraplex.tenant": record.tenant,
        "loraplex.client_request_id": record.client_request_id,
        "loraplex.constraint": record.constraint,
        **{f"loraplex.label.{name}": value for name, value in record.labels.items()},
        "loraplex.model_revision": record.model_revision,
        "loraplex.adapter_digest": record.adapter_digest,
        "loraplex.adapters": [f"{adapter.name}@{adapter.digest}*{adapter.weight!r}" for adapter in record.adapters],
        "loraplex.adapter_load_seconds": record.adapter_load_seconds,
    }


def _requested(record: GenerationRecord) -> str:
    """The model as callers name it: the adapters, without the weights of a sum, or else the base model."""
    return SUM.join(record.adapter_names) or record.model


def _error_type(status: str) -> str:
    return "" if status == "OK" else status
