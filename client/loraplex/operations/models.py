"""The admin port: base models."""

from typing import Unpack

from loraplex.channel import CallOptions
from loraplex.operations.base import Listing, Operation, StreamOperation, model_name, new_id, optional_duration
from loraplex.v1 import models_pb2


def get_model(name: str, **call: Unpack[CallOptions]) -> Operation[models_pb2.Model]:
    """Return one model as it is now.

    Args:
        name: Id of the model, or its full name "models/{model}".
    """
    request = models_pb2.GetModelRequest(name=model_name(name))
    return Operation("/loraplex.v1.ModelService/GetModel", request, models_pb2.Model, call)


def list_models(**call: Unpack[CallOptions]) -> Listing[models_pb2.Model]:
    """Return all models, ordered by name."""

    def page(token: str) -> Operation[models_pb2.ListModelsResponse]:
        request = models_pb2.ListModelsRequest(page_token=token)
        return Operation("/loraplex.v1.ModelService/ListModels", request, models_pb2.ListModelsResponse, call)

    return Listing(page, lambda response: response.models)


def load_model(
    name: str, *, wait: float | None = None, request_id: str | None = None, **call: Unpack[CallOptions]
) -> Operation[models_pb2.Model]:
    """Start to load a model, and return it as it is then.

    Args:
        name: Id of the model, or its full name "models/{model}".
        wait: Seconds to wait at most until it is loaded or has failed. None: return at once.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
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
    """Start to unload a model, and return it as it is then.

    Args:
        name: Id of the model, or its full name "models/{model}".
        grace: Seconds that running requests may take to end. None: the server's grace for shutting down.
        wait: Seconds to wait at most until it is unloaded. None: return at once.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
    request = models_pb2.UnloadModelRequest(
        name=model_name(name),
        grace=optional_duration(grace),
        wait=optional_duration(wait),
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.ModelService/UnloadModel", request, models_pb2.Model, call)


def watch_models(
    name: str | None = None, **call: Unpack[CallOptions]
) -> StreamOperation[models_pb2.WatchModelsResponse]:
    """Receive all models, or one, and then every change.

    Args:
        name: Id of the model, or its full name "models/{model}". None: all models.
    """
    request = models_pb2.WatchModelsRequest(name=None if name is None else model_name(name))
    return StreamOperation("/loraplex.v1.ModelService/WatchModels", request, models_pb2.WatchModelsResponse, call)
