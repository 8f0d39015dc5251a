"""The picker's process: its server, its health and its metrics."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from loraplex_service.keeping import kept
from loraplex_service.picker.config import PickerConfig
from loraplex_service.picker.envoy import METHOD, SERVICE, ProcessingRequest, ProcessingResponse
from loraplex_service.picker.processor import Picker, Processor
from loraplex_service.picker.replicas import Fleet
from loraplex_service.ports.health import NOT_SERVING, SERVING, HealthServicer

logger = logging.getLogger(__name__)

MAX_STREAMS: Final = 16_384  # requests of Envoy's that are looked at, or followed, at the same time
MAX_CONNECTIONS: Final = 1024  # Envoy needs few
HEALTH_SECONDS: Final = 0.1  # between two looks whether anything is known
STOP_SECONDS: Final = 2.0
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 8 << 20),  # Envoy holds back 1 MiB of a body, unless it is told otherwise
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.keepalive_time_ms", 60_000),  # finds callers that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
)


@asynccontextmanager
async def picking(config: PickerConfig) -> AsyncIterator[str]:
    """Serve Envoy for the length of the block; yields the address. Raises OSError, RuntimeError for a taken one."""
    fleet = Fleet(config)
    picker = Picker(config, fleet)
    health = HealthServicer()
    async with AsyncExitStack() as stack:
        if config.metrics_listen is not None:
            stack.enter_context(_metrics(config.metrics_listen, picker, fleet))
        await stack.enter_async_context(fleet.watched())
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_STREAMS)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        server.add_generic_rpc_handlers((_handler(Processor(picker)),))
        port = server.add_insecure_port(config.listen)
        await server.start()
        stack.push_async_callback(server.stop, STOP_SECONDS)
        telling = asyncio.create_task(kept("tell health", partial(_tell_health, health, fleet)), name="health")
        stack.callback(telling.cancel)
        yield f"{config.listen.rpartition(':')[0]}:{port}"


def _handler(processor: Processor) -> grpc.GenericRpcHandler:
    method = grpc.stream_stream_rpc_method_handler(
        processor.process,
        request_deserializer=ProcessingRequest.FromString,
        response_serializer=ProcessingResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})


async def _tell_health(health: HealthServicer, fleet: Fleet) -> None:
    """As endpoint pickers of the Gateway API do: alive at once, and ready while there is something to choose from."""
    health.set("", SERVING)
    health.set("liveness", SERVING)
    while True:
        for name in ("readiness", SERVICE):
            health.set(name, SERVING if fleet.is_known else NOT_SERVING)
        await asyncio.sleep(HEALTH_SECONDS)


class _Page(Collector):
    def __init__(self, picker: Picker, fleet: Fleet) -> None:
        self._picker = picker
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        picks = CounterMetricFamily("loraplex_picker_picks", "Requests, by where their adapter was.", labels=("place",))
        for place, count in self._picker.picks.copy().items():
            picks.add_metric((place,), count)
        replicas = GaugeMetricFamily("loraplex_picker_replicas", "Replicas, by their health.", labels=("health",))
        for health, count in self._fleet.by_health().items():
            replicas.add_metric((health.value,), count)
        return picks, replicas


@contextmanager
def _metrics(address: str, picker: Picker, fleet: Fleet) -> Iterator[None]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(picker, fleet))
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host.strip("[]"), registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
