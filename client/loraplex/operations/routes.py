"""The admin port: routes."""

from collections.abc import Sequence
from typing import Unpack

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.channel import CallOptions
from loraplex.operations.base import Listing, Operation, new_id, route_name, tenant_name
from loraplex.v1 import routes_pb2


def get_route(name: str, *, tenant: str = "shared", **call: Unpack[CallOptions]) -> Operation[routes_pb2.Route]:
    """Return one route.

    Args:
        name: Id of the route, or its full name "tenants/{tenant}/routes/{route}".
        tenant: Id of the tenant that has it, unless `name` is a full name.
    """
    request = routes_pb2.GetRouteRequest(name=route_name(name, tenant))
    return Operation("/loraplex.v1.RouteService/GetRoute", request, routes_pb2.Route, call)


def list_routes(*, tenant: str = "-", **call: Unpack[CallOptions]) -> Listing[routes_pb2.Route]:
    """Return the routes of a tenant, ordered by name.

    Args:
        tenant: Id of the tenant. "-": all tenants that the caller may see.
    """

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
    """Change a route, and return it as it is then.

    Args:
        route: Route as it shall be. Its name says which route to change.
        update_mask: Fields to change: targets, fallback, default_sampling, labels, default_constraint. None: all.
        allow_missing: Whether to create the route if there is none.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
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
    """Delete a route. Requests that it routed go on.

    Args:
        name: Id of the route, or its full name "tenants/{tenant}/routes/{route}".
        tenant: Id of the tenant that has it, unless `name` is a full name.
        etag: Delete only if this is still its etag. None: delete in any case.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
    request = routes_pb2.DeleteRouteRequest(name=route_name(name, tenant), etag=etag, request_id=request_id or new_id())
    return Operation("/loraplex.v1.RouteService/DeleteRoute", request, Empty, call)


def resolve_target(
    model: str,
    *,
    tenant: str | None = None,
    target_key: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[routes_pb2.ResolveTargetResponse]:
    """Say what the `model` of a generation would mean, without running anything.

    Args:
        model: Name of a model, an adapter, an adapter version or a route.
        tenant: Id of the tenant in which ids are looked up. None: the caller's own.
        target_key: Routing key that chooses among the targets of a route. None: no key.
    """
    request = routes_pb2.ResolveTargetRequest(
        model=model, parent=None if tenant is None else tenant_name(tenant), routing_key=target_key
    )
    return Operation("/loraplex.v1.RouteService/ResolveTarget", request, routes_pb2.ResolveTargetResponse, call)
