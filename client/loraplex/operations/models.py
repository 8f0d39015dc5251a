"""The admin port: base models."""

from typing import Unpack

from loraplex.channel import CallOptions
from loraplex.operations.base import Listing, Operation, model_name, new_id, optional_duration
from loraplex.v1 import models_pb2


def get_model(name: str, **call: Unpack[CallOptions]) -> Operation[models_pb2.Model]:
    """One model as it is now."""
    request = models_pb2.GetModelRequest(name=model_name(name))
    return Operation("/loraplex.v1.ModelService/GetModel", request, models_pb2.Model, call)


def list_models(**call: Unpack[CallOptions]) -> Listing[models_pb2.Model]:
    """All models, ordered by name."""

    def page(token: str) -> Operation[models_pb2.ListModelsResponse]:
        request = models_pb2.ListModelsRequest(page_token=token)
        return Operation("/loraplex.v1.ModelService/ListModels", request, models_pb2.ListModelsResponse, call)

    return Listing(page, lambda response: response.models)


def load_model(
    name: str, *, wait: float | None = None, request_id: str | None = None, **call: Unpack[CallOptions]
) -> Operation[models_pb2.Model]:
    """Start to load a model; with `wait`, return when it is loaded or has failed, or after that time."""
    request = models_pb2.LoadModelRequest(
        name=model_name(name), wait=optional_duration(wait), request_id=request_id or new_id()
    )
    return Operation("/loraplex.v1.ModelService/LoadModel", request, models_pb2.Model, call)


def unload_model(
    name: str,
    *,
    grace: float | None = None,
    wait: float | None = None,
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[models_pb2.Model]:
    """Start to unload a model, leaving running requests `grace`; with `wait`, return when done or after that time."""
    request = models_pb2.UnloadModelRequest(
        name=model_name(name),
        grace=optional_duration(grace),
        wait=optional_duration(wait),
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.ModelService/UnloadModel", request, models_pb2.Model, call)


def watch_models(name: str | None = None, **call: Unpack[CallOptions]) -> Operation[models_pb2.WatchModelsResponse]:
    """All models, or one, then every change."""
    request = models_pb2.WatchModelsRequest(name=None if name is None else model_name(name))
    return Operation("/loraplex.v1.ModelService/WatchModels", request, models_pb2.WatchModelsResponse, call)
