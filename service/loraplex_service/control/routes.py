"""RouteService: stable names for models and adapters, and the resolution of any name."""

import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.v1 import routes_pb2_grpc
from loraplex.v1.routes_pb2 import (
    DeleteRouteRequest,
    GetRouteRequest,
    ListRoutesRequest,
    ListRoutesResponse,
    ResolveTargetRequest,
    ResolveTargetResponse,
    Route,
    UpdateRouteRequest,
)
from loraplex_adapters.grammar import ROUTE_NAME
from loraplex_adapters.versions import AdapterVersion
from loraplex_service.admission.tenants import Tenants
from loraplex_service.call import current_call
from loraplex_service.control.once import Once
from loraplex_service.control.paging import page
from loraplex_service.control.sight import seen_tenants
from loraplex_service.errors import Aborted, InvalidRequest, LoraplexError, NotFound, PermissionDenied, Violation
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.grammar import route_name, tenant_id
from loraplex_service.names.routing import RouteBook, weight_of
from loraplex_service.requests.forms import Forms
from loraplex_service.state import State
from loraplex_service.timestamps import timestamp

Context = grpc.aio.ServicerContext[Any, Any]

R = TypeVar("R")
T = TypeVar("T")

UPDATABLE = ("targets", "fallback", "default_sampling", "labels", "default_constraint")


class RouteServicer(routes_pb2_grpc.RouteServiceServicer):
    """Serves the route book. A change is in force, and saved, when its call returns."""

    def __init__(
        self,
        catalog: Catalog,
        routes: RouteBook,
        state: State,
        tenants: Tenants,
        forms: Forms,
        prefetch: Callable[[AdapterVersion], None],
    ) -> None:
        """`prefetch`: called with every adapter to which requests may soon be routed."""
        self._catalog = catalog
        self._routes = routes
        self._state = state
        self._tenants = tenants
        self._forms = forms
        self._prefetch = prefetch
        self._once = Once()

    async def GetRoute(self, request: GetRouteRequest, context: Context) -> Route:  # noqa: N802
        return self._get(request.name)

    async def ListRoutes(self, request: ListRoutesRequest, context: Context) -> ListRoutesResponse:  # noqa: N802
        routes = self._routes.all(seen_tenants(request.parent))
        shown, token = page(routes, lambda route: route.name, lambda route: route, request)
        return ListRoutesResponse(routes=shown, next_page_token=token)

    async def UpdateRoute(self, request: UpdateRouteRequest, context: Context) -> Route:  # noqa: N802
        return await self._once.run("UpdateRoute", request.request_id, lambda: self._changed(self._update, request))

    async def DeleteRoute(self, request: DeleteRouteRequest, context: Context) -> Empty:  # noqa: N802
        return await self._once.run("DeleteRoute", request.request_id, lambda: self._changed(self._delete, request))

    async def ResolveTarget(  # noqa: N802
        self, request: ResolveTargetRequest, context: Context
    ) -> ResolveTargetResponse:
        if not request.model:
            raise InvalidRequest.at("model", "is required")
        tenant = tenant_id(request.parent, "parent") if request.HasField("parent") else current_call().tenant
        assert tenant is not None, "tenants/- is refused above"
        target = self._catalog.resolve(tenant, request.model, "model", request.routing_key)
        return ResolveTargetResponse(target=target.resolved())

    async def _changed(self, change: Callable[[R], Coroutine[Any, Any, T]], request: R) -> T:
        return await self._state.change(lambda: change(request))

    async def _update(self, request: UpdateRouteRequest) -> Route:
        wanted = request.route
        known = self._routes.get(route_name(wanted.name, "route.name"))
        if known is None and not request.allow_missing:
            raise _no_route(wanted.name)
        if known is not None:
            _check_etag(known, wanted.etag)
        now = time.time()
        route = Route(name=wanted.name, create_time=timestamp(now))
        if known is not None:
            route.CopyFrom(known)
        fields = _fields_to_change(request.update_mask if known is not None else FieldMask())
        _take_fields(route, wanted, fields)
        violations = list(self._violations(route, fields))
        if violations:
            raise InvalidRequest(*violations)
        tenant = self._tenants.get(_owner(route))
        await self._forms.grammar(route.default_constraint, tenant, "route.default_constraint")
        route.update_time.CopyFrom(timestamp(now))
        route.etag = f"{time.time_ns():x}"
        self._check_quota(route, known)
        await self._routes.put(route)
        for target in route.targets:
            self._prefetch_target(route, target.model)
        return route

    async def _delete(self, request: DeleteRouteRequest) -> Empty:
        _check_etag(self._get(request.name), request.etag)
        await self._routes.delete(request.name)
        return Empty()

    def _check_quota(self, route: Route, known: Route | None) -> None:
        """Raise QuotaExceeded if the tenant may have no further route, or no more bytes of routes."""
        owner = _owner(route)
        tenant = self._tenants.get(owner)
        if known is None:
            tenant.check_routes(self._routes.count(owner) + 1)
        more = route.ByteSize() - (0 if known is None else known.ByteSize())
        if more > 0:
            tenant.check_state(self._state.size(owner) + more)

    def _violations(self, route: Route, fields: Collection[str]) -> Iterator[Violation]:
        """Violations in the fields that change. Other fields are not checked: a target may have been deleted since."""
        if not route.targets:
            yield Violation("route.targets", "is empty; give at least one")
        elif not sum(weight_of(target) for target in route.targets):
            yield Violation("route.targets", "has weights that sum to zero: no request could go anywhere")
        if len({target.model for target in route.targets}) < len(route.targets):
            yield Violation("route.targets", "names a target twice; add the weights")
        for index, target in enumerate(route.targets if "targets" in fields else ()):
            yield from self._target_violations(route, target.model, f"route.targets[{index}].model")
        if "fallback" in fields and route.HasField("fallback"):
            yield from self._target_violations(route, route.fallback, "route.fallback")
        if route.default_sampling.HasField("n"):
            yield Violation("route.default_sampling.n", "cannot be set by a route")
        if route.default_sampling.HasField("best_of"):
            yield Violation("route.default_sampling.best_of", "cannot be set by a route")

    def _target_violations(self, route: Route, name: str, field: str) -> Iterator[Violation]:
        if ROUTE_NAME.fullmatch(name):
            yield Violation(field, f"{name[:200]!r} is a route; name a model, an adapter or a version")
            return
        try:
            self._catalog.target(_owner(route), name, field)
        except (InvalidRequest, NotFound, PermissionDenied) as error:
            yield Violation(field, error.message)
        except LoraplexError:
            return  # it is there, and may be usable when requests come

    def _prefetch_target(self, route: Route, name: str) -> None:
        try:
            adapter = self._catalog.target(_owner(route), name, "model").adapter
        except LoraplexError:
            return
        if adapter is not None:
            self._prefetch(adapter)

    def _get(self, name: str) -> Route:
        """Raises InvalidRequest, NotFound."""
        route = self._routes.get(route_name(name, "name"))
        if route is None:
            raise _no_route(name)
        return route


def _fields_to_change(mask: FieldMask) -> Collection[str]:
    """Raises InvalidRequest for a field that cannot be changed."""
    for path in mask.paths:
        if path not in UPDATABLE:
            raise InvalidRequest.at("update_mask", f"{path[:80]!r} cannot be changed; {', '.join(UPDATABLE)} can")
    return mask.paths or UPDATABLE


def _take_fields(route: Route, wanted: Route, fields: Collection[str]) -> None:
    taken = Route()
    taken.CopyFrom(wanted)
    for name in Route.DESCRIPTOR.fields_by_name:
        if name in fields:
            route.ClearField(name)  # type: ignore[arg-type]  # it is a name of a field
        else:
            taken.ClearField(name)  # type: ignore[arg-type]
    route.MergeFrom(taken)


def _owner(route: Route) -> str:
    return route.name.split("/")[1]


def _check_etag(route: Route, etag: str) -> None:
    if etag and etag != route.etag:
        raise Aborted(f"{route.name} has changed since it was read; its etag is {route.etag} now")


def _no_route(name: str) -> NotFound:
    message = f"there is no route {name[:200]!r}; list those there are, or create it with allow_missing"
    return NotFound("ROUTE_NOT_FOUND", name, message)
