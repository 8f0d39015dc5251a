"""The admin port: routes."""

from collections.abc import Sequence
from typing import Unpack

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.channel import CallOptions
from loraplex.operations.base import Listing, Operation, new_id, route_name, tenant_name
from loraplex.v1 import routes_pb2


def get_route(name: str, *, tenant: str = "shared", **call: Unpack[CallOptions]) -> Operation[routes_pb2.Route]:
    """One route."""
    request = routes_pb2.GetRouteRequest(name=route_name(name, tenant))
    return Operation("/loraplex.v1.RouteService/GetRoute", request, routes_pb2.Route, call)


def list_routes(*, tenant: str = "-", **call: Unpack[CallOptions]) -> Listing[routes_pb2.Route]:
    """The routes of a tenant, or of all that the caller may see, ordered by name."""

    def page(token: str) -> Operation[routes_pb2.ListRoutesResponse]:
        request = routes_pb2.ListRoutesRequest(parent=tenant_name(tenant), page_token=token)
        return Operation("/loraplex.v1.RouteService/ListRoutes", request, routes_pb2.ListRoutesResponse, call)

    return Listing(page, lambda response: response.routes)


def update_route(
    route: routes_pb2.Route,
    *,
    update_mask: Sequence[str] | None = None,
    allow_missing: bool = False,
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[routes_pb2.Route]:
    """Change a route, or create it with allow_missing."""
    request = routes_pb2.UpdateRouteRequest(
        route=route,
        update_mask=None if update_mask is None else FieldMask(paths=update_mask),
        allow_missing=allow_missing,
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.RouteService/UpdateRoute", request, routes_pb2.Route, call)


def delete_route(
    name: str,
    *,
    tenant: str = "shared",
    etag: str | None = None,
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[Empty]:
    """Delete a route."""
    request = routes_pb2.DeleteRouteRequest(name=route_name(name, tenant), etag=etag, request_id=request_id or new_id())
    return Operation("/loraplex.v1.RouteService/DeleteRoute", request, Empty, call)


def resolve_target(
    model: str,
    *,
    tenant: str | None = None,
    target_key: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[routes_pb2.ResolveTargetResponse]:
    """What the `model` of a generation would mean, on behalf of a tenant and with a routing key."""
    request = routes_pb2.ResolveTargetRequest(
        model=model, parent=None if tenant is None else tenant_name(tenant), routing_key=target_key
    )
    return Operation("/loraplex.v1.RouteService/ResolveTarget", request, routes_pb2.ResolveTargetResponse, call)
