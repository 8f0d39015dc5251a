"""What a collector of OpenTelemetry receives of a streamed request."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from loraplex import NotFound
from loraplex.v1.adapters_pb2 import Adapter
from loraplex_service.telemetry.config import OtlpConfig
from loraplex_service.telemetry.trace_context import trace_id_of
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector(TraceServiceServicer, MetricsServiceServicer):
    """Keeps what it is sent. In threads of its own, as a collector is in a process of its own."""

    def __init__(self) -> None:
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str | bytes]] = []

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        if isinstance(request, ExportTraceServiceRequest):
            self.traces.append(request)
            return ExportTraceServiceResponse()
        self.metrics.append(request)
        return ExportMetricsServiceResponse()

    def spans(self) -> list[Span]:
        scopes = [scope for request in self.traces for one in request.resource_spans for scope in one.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def points(self, name: str) -> list[HistogramDataPoint]:
        """Of the last export: histograms are cumulative."""
        scopes = [scope for one in self.metrics[-1].resource_metrics for scope in one.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics if metric.name == name]
        return [point for metric in metrics for point in metric.histogram.data_points]


def values(attributes: Any) -> dict[str, Any]:
    def value(item: KeyValue) -> Any:
        kind = item.value.WhichOneof("value")
        if kind == "array_value":
            return [one.string_value for one in item.value.array_value.values]
        return None if kind is None else getattr(item.value, kind)

    return {item.key: value(item) for item in attributes}


class Setting:
    """A service that was run for the test, and what its collector was sent in the end."""

    def __init__(self, collector: Collector, models: Path, roots: Path, address: str) -> None:
        self.collector = collector
        self.endpoint = f"http://{address}"
        self._models, self._roots = models, roots

    def service(self, **config: Any) -> Any:
        otlp = OtlpConfig(endpoint=self.endpoint, headers={"api-key": "k"}, **config)
        return control_plane(self._models, self._roots, otlp=otlp)


@pytest.fixture
def setting(byte_tokenizer_directory: Path, tmp_path: Path) -> Any:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)
    add_MetricsServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Setting(collector, byte_tokenizer_directory, tmp_path, f"127.0.0.1:{port}")
    server.stop(None).wait()


async def stream(control: ControlPlane, model: str, traceparent: str = TRACEPARENT) -> None:
    call = control.client.stream_generate(model, "abc", max_tokens=5, metadata={"traceparent": traceparent})
    await call.collect()


async def test_the_span_of_a_call_continues_the_callers_trace(setting: Setting) -> None:
    async with setting.service() as control:
        await stream(control, "tiny")
    [span] = [span for span in setting.collector.spans() if span.kind == Span.SPAN_KIND_SERVER]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "loraplex.v1.InferenceService/StreamGenerate"
    attributes = values(span.attributes)
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.method"] == "loraplex.v1.InferenceService/StreamGenerate"
    assert attributes["rpc.response.status_code"] == "OK"


async def test_the_span_of_a_generation_is_in_that_of_its_call(setting: Setting) -> None:
    async with setting.service() as control:
        source = str(write_adapter(control.roots / "pirate"))
        await control.admin.create_adapter("pirate", base_model="tiny", source=source, tenant="default")
        await stream(control, "pirate")
    spans = {span.name: span for span in setting.collector.spans()}
    call = spans["loraplex.v1.InferenceService/StreamGenerate"]
    span = spans["text_completion tenants/default/adapters/pirate"]
    assert (span.trace_id, span.parent_span_id) == (call.trace_id, call.span_id)
    attributes = values(span.attributes)
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.provider.name"] == "loraplex"
    assert attributes["gen_ai.request.model"] == "tenants/default/adapters/pirate"
    assert attributes["gen_ai.response.model"] == "models/tiny"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.output_tokens"] == 5
    assert attributes["gen_ai.response.finish_reasons"] == ["max_tokens"]
    assert [event.name for event in span.events] == ["scheduled", "first_token"]
    assert span.start_time_unix_nano <= span.events[1].time_unix_nano <= span.end_time_unix_nano


async def test_both_spans_have_what_the_caller_calls_the_request(setting: Setting) -> None:
    async with setting.service() as control:
        await control.client.generate("tiny", "abc", max_tokens=5, client_request_id="mine", labels={"team": "x"})
    spans = {span.name: values(span.attributes) for span in setting.collector.spans()}
    generation = spans["text_completion models/tiny"]
    assert spans["loraplex.v1.InferenceService/Generate"]["loraplex.client_request_id"] == "mine"
    assert (generation["loraplex.client_request_id"], generation["loraplex.label.team"]) == ("mine", "x")


async def test_the_histograms_have_the_names_of_the_conventions(setting: Setting) -> None:
    async with setting.service() as control:
        await stream(control, "tiny")
    for name in (
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    ):
        [point] = setting.collector.points(name)
        assert point.count == 1
        assert values(point.attributes)["gen_ai.request.model"] == "models/tiny"
    usage = {
        values(p.attributes)["gen_ai.token.type"]: p.sum for p in setting.collector.points("gen_ai.client.token.usage")
    }
    assert usage == {"input": 3, "output": 5}
    methods = [values(point.attributes)["rpc.method"] for point in setting.collector.points("rpc.server.call.duration")]
    assert "loraplex.v1.InferenceService/StreamGenerate" in methods


async def create(control: ControlPlane, adapter_id: str, seed: int) -> Adapter:
    source = str(write_adapter(control.roots / adapter_id, seed=seed))
    return await control.admin.create_adapter(adapter_id, base_model="tiny", source=source, wait=MOST_SECONDS)


async def test_a_weighted_sum_is_one_generation_that_names_all_its_adapters(setting: Setting) -> None:
    async with setting.service() as control:
        pirate, poet = await create(control, "pirate", 0), await create(control, "poet", 1)
        await stream(control, "poet*0.3 + pirate*0.7")
    both = f"{pirate.name} + {poet.name}"
    [span] = [span for span in setting.collector.spans() if span.name == f"text_completion {both}"]
    used = {f"{one.name}@{one.digest.removeprefix('sha256:')}*{weight}" for one, weight in ((pirate, 0.7), (poet, 0.3))}
    assert set(values(span.attributes)["loraplex.adapters"]) == used
    [point] = setting.collector.points("gen_ai.server.request.duration")
    assert (values(point.attributes)["gen_ai.request.model"], point.count) == (both, 1)


async def test_the_series_of_an_adapter_end_with_it(setting: Setting) -> None:
    async with setting.service() as control:
        poet = await create(control, "poet", 1)
        await create(control, "pirate", 0)
        for model in ("pirate", "poet", "pirate*0.7 + poet*0.3"):
            await stream(control, model)
        await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    for name in ("gen_ai.server.request.duration", "gen_ai.client.token.usage"):
        points = setting.collector.points(name)
        assert {values(point.attributes)["gen_ai.request.model"] for point in points} == {poet.name}


async def test_a_refused_call_has_the_type_of_its_error_and_is_not_the_servers_fault(setting: Setting) -> None:
    async with setting.service() as control:
        with pytest.raises(NotFound):
            await stream(control, "nobody")
    [span] = setting.collector.spans()
    assert values(span.attributes)["error.type"] == "NOT_FOUND"
    assert span.status.code == span.status.STATUS_CODE_UNSET


async def test_a_call_that_its_caller_does_not_sample_has_no_span(setting: Setting) -> None:
    async with setting.service() as control:
        await stream(control, "tiny", f"00-{TRACE}-{PARENT}-00")
    assert setting.collector.spans() == []


async def test_calls_without_a_trace_are_sampled_by_the_ratio(setting: Setting) -> None:
    async with setting.service(trace_ratio=0.0) as control:
        await control.client.generate("tiny", "abc", max_tokens=1)
    assert setting.collector.spans() == []


async def test_the_collector_gets_its_headers_and_no_text(setting: Setting) -> None:
    async with setting.service() as control:
        await control.client.generate("tiny", "secret", max_tokens=6)
    assert all(headers["api-key"] == "k" for headers in setting.collector.headers)
    for request in (*setting.collector.traces, *setting.collector.metrics):
        assert b"secret" not in request.SerializeToString()


def test_what_is_not_configured_is_not_imported() -> None:
    """The SDK and the HTTP server of the page would take time at every start."""
    code = (
        "import sys; from loraplex_service.cli import main; "
        "main(['--help'], standalone_mode=False); "  # it imports all commands
        "sys.exit(int(not {'opentelemetry', 'prometheus_client'}.isdisjoint(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (TRACEPARENT, TRACE),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", TRACE),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        ("nonsense", ""),
    ],
)
def test_a_traceparent_that_is_not_valid_is_no_trace(traceparent: str, trace_id: str) -> None:
    assert trace_id_of({"traceparent": traceparent}) == trace_id
