"""The dialects by their names in the configuration."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from loraplex_service.dialect_stubs import openengine_pb2_grpc
from loraplex_service.dialect_stubs.kserve_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from loraplex_service.dialect_stubs.vllm_engine_pb2_grpc import add_VllmEngineServicer_to_server
from loraplex_service.dialect_stubs.vllm_pb2_grpc import add_ControlServicer_to_server, add_InferenceServicer_to_server
from loraplex_service.dialects.backend import Backend
from loraplex_service.dialects.kserve.servicer import KServeServicer
from loraplex_service.dialects.openengine.control import OpenEngineControlServicer
from loraplex_service.dialects.openengine.inference import OpenEngineInferenceServicer
from loraplex_service.dialects.vllm.control import VllmControlServicer
from loraplex_service.dialects.vllm.engine import VllmEngineServicer
from loraplex_service.dialects.vllm.inference import VllmInferenceServicer
from loraplex_service.ports.listeners import Service


def _kserve(backend: Backend) -> Sequence[Service]:
    servicer = KServeServicer(backend)
    return [Service("inference.GRPCInferenceService", servicer, add_GRPCInferenceServiceServicer_to_server)]


def _vllm(backend: Backend) -> Sequence[Service]:
    return [
        Service("vllm.Inference", VllmInferenceServicer(backend), add_InferenceServicer_to_server),
        Service("vllm.Control", VllmControlServicer(backend), add_ControlServicer_to_server),
        Service("vllm.grpc.engine.VllmEngine", VllmEngineServicer(backend), add_VllmEngineServicer_to_server),
    ]


def _openengine(backend: Backend) -> Sequence[Service]:
    inference, control = OpenEngineInferenceServicer(backend), OpenEngineControlServicer(backend)
    return [
        Service("openengine.v1.Inference", inference, openengine_pb2_grpc.add_InferenceServicer_to_server),
        Service("openengine.v1.Control", control, openengine_pb2_grpc.add_ControlServicer_to_server),
    ]


BY_NAME: Mapping[str, Callable[[Backend], Sequence[Service]]] = {
    "kserve_v2": _kserve,
    "vllm": _vllm,
    "openengine": _openengine,
}


def dialect_services(names: Iterable[str], backend: Backend) -> list[Service]:
    """The services of these dialects, to be added to the data port."""
    return [service for name in names for service in BY_NAME[name](backend)]
