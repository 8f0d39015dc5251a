"""Resolve a request's field `model` to a base model, adapter versions and all that the request needs of them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from loraplex.v1.routes_pb2 import Route
from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import SHARED_TENANT, AdapterState, AdapterVersion
from loraplex_engine.link.client import EngineClient
from loraplex_service.call import sees_inside
from loraplex_service.errors import FailedPrecondition, InvalidRequest, NotFound, PermissionDenied, Unavailable
from loraplex_service.names.grammar import ASKED_ADAPTER_NAME, ASKED_ID, ASKED_MODEL_NAME, ASKED_ROUTE_NAME
from loraplex_service.names.routing import RouteBook, choose
from loraplex_service.names.target import LoadedModel, Target


class Models(Protocol):
    """The base models that the operator configured."""

    def serving(self, name: str) -> LoadedModel:
        """The model with this bare id.

        Raises NotFound (MODEL_NOT_FOUND), FailedPrecondition (MODEL_UNLOADED) or Unavailable (MODEL_LOADING,
        ENGINE_RESTARTING).
        """

    async def successor(self, name: str, revision: str) -> EngineClient:
        """Wait until the engine that follows one that died serves, with this revision of the model.

        Raises what `serving` raises if no engine will.
        """


_WEIGHT = re.compile(r"-?(\d{1,4}(\.\d{0,9})?|\.\d{1,9})")
MAX_WEIGHT = 16.0  # largest absolute weight of an adapter in a composition
MAX_PARTS = 8  # most adapters of a composition


class Catalog:
    """Finds the target of a request by its name, on behalf of a tenant."""

    def __init__(self, models: Models, adapters: AdapterRegistry, routes: RouteBook) -> None:
        self._models = models
        self._adapters = adapters
        self._routes = routes

    def resolve(self, tenant: str, name: str, path: str, routing_key: str = "") -> Target:
        """Resolve `name` for this tenant: a route of that name first, else what `target` finds.

        A route uses its fallback if the chosen target cannot be used now. `routing_key`: requests with the
        same key go to the same target of a route. Raises what `target` does.
        """
        route = self._route(tenant, name)
        if route is None:
            return self.target(tenant, name, path)
        owner = route.name.split("/")[1]
        try:
            target = self.target(owner, choose(route, routing_key), path)
        except (NotFound, FailedPrecondition, Unavailable):
            if not route.HasField("fallback"):
                raise
            target = self.target(owner, route.fallback, path)
        return replace(target, route=route)

    def target(self, tenant: str, name: str, path: str) -> Target:
        """Find a model or adapter. A bare id means the tenant's adapter, else a shared one, else a model.

        An adapter may still be LOADING: the request then waits for it as for a cold one.

        `path`: the field that holds the name. Raises InvalidRequest, NotFound, PermissionDenied (before looking),
        FailedPrecondition (ADAPTER_INVALID, …) for an unusable version, and what `Models.serving` raises.
        """
        if "*" in name or "+" in name:
            return self._composition(tenant, name, path)
        if match := ASKED_MODEL_NAME.fullmatch(name):
            return Target(self._models.serving(match[1]))
        if match := ASKED_ADAPTER_NAME.fullmatch(name):
            _check_may_see(tenant, match["tenant"])
            adapter = self._adapter(name)
        elif match := ASKED_ID.fullmatch(name):
            adapter = self._adapter(f"tenants/{tenant}/adapters/{name}")
            adapter = adapter or self._adapter(f"tenants/{SHARED_TENANT}/adapters/{name}")
            if adapter is None and match["version"] is None:
                return Target(self._model(tenant, name))
        else:
            raise InvalidRequest.at(
                path,
                f"{name[:200]!r} is not a valid name: give models/{{model}}, tenants/{{tenant}}/adapters/{{adapter}}, "
                "with @{version} (12 hex digits) or without, tenants/{tenant}/routes/{route}, the id alone, or a "
                "weighted sum of adapters such as a*0.7 + b*0.3",
            )
        if adapter is None:
            raise _not_found("ADAPTER", name)
        return Target(self._models.serving(adapter.spec.base_model), adapter)

    def _composition(self, tenant: str, name: str, path: str) -> Target:
        """The target of a weighted sum, or of one weighted adapter: "a*0.7 + b*0.3"."""
        terms = [_term(term, path) for term in name.split("+")]
        if len(terms) > MAX_PARTS:
            raise InvalidRequest.at(path, f"composes {len(terms)} adapters; at most {MAX_PARTS} are allowed")
        parts: dict[AdapterKey, tuple[AdapterVersion, float]] = {}
        for adapter_name, weight in terms:
            target = self.target(tenant, adapter_name, path)
            if target.adapter is None:
                raise InvalidRequest.at(path, f"{adapter_name!r} is not an adapter: only adapters have weights")
            if target.adapter.key in parts:
                raise InvalidRequest.at(path, f"names the adapter {adapter_name!r} twice: add its weights up")
            parts[target.adapter.key] = target.adapter, weight
        bases = sorted({version.spec.base_model for version, _ in parts.values()})
        if len(bases) > 1:
            raise InvalidRequest.at(path, f"composes adapters of different base models: {', '.join(bases)}")
        return Target(self._models.serving(bases[0]), parts=tuple(parts.values()))

    def _route(self, tenant: str, name: str) -> Route | None:
        """The route of this name; None: it names something else. The tenant's own adapter hides a shared route."""
        if match := ASKED_ROUTE_NAME.fullmatch(name):
            _check_may_see(tenant, match["tenant"])
            route = self._routes.get(name)
            if route is None:
                raise _not_found("ROUTE", name)
            return route
        if not ASKED_ID.fullmatch(name):
            return None
        own = self._routes.get(f"tenants/{tenant}/routes/{name}")
        if own is not None or self._adapter(f"tenants/{tenant}/adapters/{name}") is not None:
            return own
        return self._routes.get(f"tenants/{SHARED_TENANT}/routes/{name}")

    async def successor(self, model: LoadedModel) -> EngineClient:
        """Wait for the engine that follows one that died. Raises what `Models.successor` does."""
        return await self._models.successor(model.name, model.revision)

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion]) -> Iterator[Callable[[], None]]:
        """Count the versions of a request as used for the length of the block, so that deleting them waits.

        Yields a function to call at the request's first token; until then the request counts as waiting.
        Raises NotFound if a version was deleted after it was resolved.
        """
        for version in versions:
            if self._adapter(version.version_name) is None:
                raise _not_found("ADAPTER", version.version_name)
        for version in versions:
            self._adapters.begin_request(version.key)
        has_started = False

        def start() -> None:
            nonlocal has_started
            has_started = True
            for version in versions:
                self._adapters.start_request(version.key)

        try:
            yield start
        finally:
            for version in versions:
                self._adapters.end_request(version.key, has_started)

    def _model(self, tenant: str, name: str) -> LoadedModel:
        """The model of a bare id. Its NotFound mentions adapters too, since a bare id may mean one."""
        try:
            return self._models.serving(name)
        except NotFound as error:
            message = f"{error.message}; nor is there an adapter or a route of that name for tenant {tenant!r}"
            raise NotFound(error.reason, error.resource_name, message) from None

    def _adapter(self, name: str) -> AdapterVersion | None:
        """The version of this full name; None: there is none. Raises FailedPrecondition for one that cannot be used."""
        try:
            version = self._adapters.get(name)
        except AdapterNotFound:
            return None
        if version.state is AdapterState.FAILED:
            owner = version.key.name.partition("/")[0]
            problems = "; ".join(version.problems) if sees_inside(owner) else "ask its operator for the reason"
            raise FailedPrecondition(version.reason, f"adapter {version.version_name} cannot be served: {problems}")
        return version if version.state is not AdapterState.DELETING else None


def _term(term: str, path: str) -> tuple[str, float]:
    """Parse one term of a weighted sum: an adapter and its weight, by default 1."""
    adapter_name, _, weight = (piece.strip() for piece in term.partition("*"))
    if not adapter_name or ("*" in term and not _WEIGHT.fullmatch(weight)):
        raise InvalidRequest.at(path, f"{term.strip()[:200]!r} is not a weighted adapter: write {{adapter}}*{{number}}")
    value = float(weight) if weight else 1.0
    if abs(value) > MAX_WEIGHT:
        raise InvalidRequest.at(
            path, f"weight {weight} of {adapter_name[:200]!r}: -{MAX_WEIGHT:g} to {MAX_WEIGHT:g} are allowed"
        )
    return adapter_name, value


def _check_may_see(tenant: str, owner: str) -> None:
    if owner not in (tenant, SHARED_TENANT):
        raise PermissionDenied(f"tenant {tenant!r} may not use resources of tenant {owner!r}")


def _not_found(kind: str, name: str) -> NotFound:
    return NotFound(
        f"{kind}_NOT_FOUND", name, f"there is no {kind.lower()} {name!r}; list those there are, or check its spelling"
    )
