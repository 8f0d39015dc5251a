"""The dialects by their names in the configuration."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from loraplex_service.dialect_stubs.kserve_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from loraplex_service.dialects.backend import Backend
from loraplex_service.dialects.kserve.servicer import KServeServicer
from loraplex_service.ports.listeners import Service


def _kserve(backend: Backend) -> Sequence[Service]:
    servicer = KServeServicer(backend)
    return [Service("inference.GRPCInferenceService", servicer, add_GRPCInferenceServiceServicer_to_server)]


BY_NAME: Mapping[str, Callable[[Backend], Sequence[Service]]] = {"kserve_v2": _kserve}


def dialect_services(names: Iterable[str], backend: Backend) -> list[Service]:
    """The services of these dialects, to be added to the data port."""
    return [service for name in names for service in BY_NAME[name](backend)]
