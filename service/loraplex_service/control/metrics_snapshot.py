"""The figures of the Prometheus page at one moment, taken on the event loop and rendered in another thread."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from typing import NamedTuple

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import AdapterStatus, EngineLimits, EngineStats
from loraplex_service.fleet.figures import FleetFigures
from loraplex_service.models.host import HostedModel
from loraplex_service.models.supervisor import EngineState
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.telemetry.setup import Telemetry


class Served(NamedTuple):
    """The sources of all figures on the page, read on the event loop."""

    telemetry: Telemetry
    models: Callable[[], Sequence[HostedModel]]
    adapter_requests: Callable[[str], Sequence[tuple[AdapterKey, int]]]  # of a model: in flight, by version
    draining: Callable[[], bool]
    sequences: Callable[[], Mapping[str, int]]  # in flight, by model
    fleet: FleetFigures | None = None  # None: the server is on its own

    def snapshot(self) -> "Snapshot":
        usage = self.telemetry.usage
        return Snapshot(
            deepcopy(self.telemetry.metrics),
            None if usage is None else usage.num_waiting,
            self.draining(),
            [_model(model, self.adapter_requests(model.name)) for model in self.models()],
            self.sequences(),
            copy(self.fleet),
        )


class Snapshot(NamedTuple):
    """The figures of the page at one moment. A snapshot never changes, so any thread can render it."""

    metrics: RequestMetrics
    usage_waiting: int | None  # None: no records are kept
    draining: bool
    models: Sequence["ModelSnapshot"]
    sequences: Mapping[str, int]  # in flight, by model
    fleet: FleetFigures | None = None  # None: the server is on its own


class ModelSnapshot(NamedTuple):
    name: str
    active: bool
    load_time: float | None
    max_resident_adapters: int
    adapter_requests: Sequence[tuple[AdapterKey, int]]
    engine: "EngineSnapshot | None"  # None: it has none
    pid: int | None = None  # of its engine
    limits: EngineLimits | None = None  # None: it was never loaded
    failed: bool = False  # could not be loaded, or not be started again


class EngineSnapshot(NamedTuple):
    stats: EngineStats | None  # None: it has not told any
    adapters: Mapping[AdapterKey, AdapterStatus]  # that it was given
    residency: Mapping[AdapterKey, Residency]
    moves: Mapping[tuple[Residency, Residency], int]


def _model(model: HostedModel, requests: Sequence[tuple[AdapterKey, int]]) -> ModelSnapshot:
    return ModelSnapshot(
        model.name,
        model.state is EngineState.ACTIVE,
        model.supervisor.load_time,
        model.config.max_resident_adapters,
        requests,
        None if model.client is None else _engine(model.client),
        model.supervisor.pid,
        model.supervisor.limits,
        model.state is EngineState.FAILED,
    )


def _engine(client: EngineClient) -> EngineSnapshot:
    adapters = client.adapters
    return EngineSnapshot(
        client.stats,
        adapters.loaded,
        adapters.residency,
        adapters.moves.copy(),
    )
