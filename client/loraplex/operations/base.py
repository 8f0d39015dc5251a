"""Kinds of operations, and the names and times that all of them take."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from loraplex.channel import CallOptions
from loraplex.generation import duration
from loraplex.v1 import inference_pb2

ADAPTER_METADATA = "loraplex-adapter"
MAX_ROUTED = 1024  # characters of a name: metadata have little room

ResponseT = TypeVar("ResponseT", bound=Message)
ItemT = TypeVar("ItemT", bound=Message)


@dataclass(frozen=True, slots=True)
class Operation(Generic[ResponseT]):
    """One request to one method, which answers once."""

    method: str  # "/package.Service/Method"
    request: Message
    response: type[ResponseT]
    call: CallOptions


class StreamOperation(Operation[ResponseT]):
    """One request to one method, which answers with a stream."""


class GenerationOperation(StreamOperation[inference_pb2.StreamGenerateResponse]):
    """One request to StreamGenerate."""


@dataclass(frozen=True, slots=True)
class Upload(Generic[ResponseT]):
    """A stream of requests to one method, which answers once."""

    method: str
    requests: Iterator[Message]
    response: type[ResponseT]
    call: CallOptions


@dataclass(frozen=True, slots=True)
class Listing(Generic[ItemT]):
    """A list that comes in pages."""

    page: Callable[[str], Operation[Any]]  # the operation that fetches the page of this token
    items: Callable[[Any], Iterable[ItemT]]  # what a page holds


def routed(call: CallOptions, model: str) -> CallOptions:
    """Add the metadata by which a router on the way finds a replica that holds the adapter; the server reads none.

    A router sees metadata only, which holds no other characters than these.
    """
    is_routed = 0 < len(model) <= MAX_ROUTED and model.isascii() and model.isprintable()
    if not is_routed or model.startswith("models/"):
        return call
    return {**call, "metadata": {ADAPTER_METADATA: model, **(call.get("metadata") or {})}}


def serialize(request: Message) -> bytes:
    return request.SerializeToString()


def model_name(model: str) -> str:
    """Return the full name, such as "models/demo" for "demo". A full name is returned as it is, here and below."""
    return model if "/" in model else f"models/{model}"


def tenant_name(tenant: str) -> str:
    """Return the full name, such as "tenants/acme" for "acme"."""
    return tenant if "/" in tenant else f"tenants/{tenant}"


def adapter_name(adapter: str, tenant: str = "shared") -> str:
    """Return the full name, such as "tenants/acme/adapters/legal" for "legal" of "acme", with or without "@version"."""
    return adapter if "/" in adapter else f"{tenant_name(tenant)}/adapters/{adapter}"


def route_name(route: str, tenant: str = "shared") -> str:
    """Return the full name, such as "tenants/acme/routes/main" for "main" of "acme"."""
    return route if "/" in route else f"{tenant_name(tenant)}/routes/{route}"


def optional_duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else duration(seconds)


def new_id() -> str:
    """Make an id by which the server knows a change again, so that retrying is safe."""
    return str(uuid.uuid4())
