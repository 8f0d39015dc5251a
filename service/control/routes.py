"""RouteService: what a name means can be asked; routes themselves are refused."""

from typing import Any, NoReturn

import grpc.aio

from loraplex.v1 import routes_pb2_grpc
from loraplex.v1.routes_pb2 import (
    DeleteRouteRequest,
    GetRouteRequest,
    ListRoutesRequest,
    ListRoutesResponse,
    ResolveTargetRequest,
    ResolveTargetResponse,
    UpdateRouteRequest,
)
from service.catalog import Catalog
from service.control.requests import tenant_id
from service.errors import FeatureUnsupported, InvalidRequest, NotFound
from service.interceptors import current_call

Context = grpc.aio.ServicerContext[Any, Any]


class RouteServicer(routes_pb2_grpc.RouteServiceServicer):
    """There are no routes here, and none can be made."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def GetRoute(self, request: GetRouteRequest, context: Context) -> NoReturn:  # noqa: N802
        raise NotFound("ROUTE_NOT_FOUND", request.name, f"there is no route {request.name[:200]!r}")

    async def ListRoutes(self, request: ListRoutesRequest, context: Context) -> ListRoutesResponse:  # noqa: N802
        tenant_id(request.parent, "parent", all_allowed=True)
        return ListRoutesResponse()

    async def UpdateRoute(self, request: UpdateRouteRequest, context: Context) -> NoReturn:  # noqa: N802
        raise FeatureUnsupported("UpdateRoute", "this server has no routes; name models and adapters directly")

    async def DeleteRoute(self, request: DeleteRouteRequest, context: Context) -> NoReturn:  # noqa: N802
        raise NotFound("ROUTE_NOT_FOUND", request.name, f"there is no route {request.name[:200]!r}")

    async def ResolveTarget(  # noqa: N802
        self, request: ResolveTargetRequest, context: Context
    ) -> ResolveTargetResponse:
        if not request.model:
            raise InvalidRequest.at("model", "is required")
        tenant = tenant_id(request.parent, "parent") if request.HasField("parent") else current_call().tenant
        assert tenant is not None, "tenants/- is refused above"
        target = self._catalog.resolve(tenant, request.model, "model")
        return ResolveTargetResponse(target=target.resolved())
