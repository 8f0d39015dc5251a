"""Routes: names that stand for one or several models or adapters."""

import math
import secrets
from hashlib import blake2b

from google.protobuf.message import DecodeError

from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_adapters.grammar import ROUTE_NAME
from loraplex_service.state import State

STATE_KIND = "route"


class RouteBook:
    """All routes of all tenants, as the contract has them, by name. They survive restarts with the state.

    Do not change a returned route: `put` a new one.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        read = {name: self._read(name, body) for name, body in state.read(STATE_KIND).items()}
        self._routes = {name: route for name, route in read.items() if route is not None}
        state.follow(STATE_KIND, self._follow)

    def _follow(self, name: str, body: bytes | None) -> None:
        """Take what another replica made of a route. Raises DecodeError, ValueError for what is none."""
        if body is None:
            self._routes.pop(name, None)
            self._state.delete(STATE_KIND, name)
        else:
            self._routes[name] = _decoded(name, body)
            self._state.put(STATE_KIND, name, body)

    def _read(self, name: str, body: bytes) -> Route | None:
        """Decode a saved route; None: the body is no route of this name, which is logged."""
        try:
            return _decoded(name, body)
        except (DecodeError, ValueError) as error:
            self._state.set_aside(STATE_KIND, name, body, error)
            return None

    def get(self, name: str) -> Route | None:
        """The route with this name (tenants/{tenant}/routes/{route}); None: there is none."""
        return self._routes.get(name)

    def all(self, tenants: set[str] | None = None) -> list[Route]:
        """The routes of these tenants, ordered by name; None: of all tenants."""
        names = [name for name in sorted(self._routes) if tenants is None or name.split("/")[1] in tenants]
        return [self._routes[name] for name in names]

    def count(self, tenant: str) -> int:
        """The number of routes that a tenant has."""
        return sum(name.startswith(f"tenants/{tenant}/") for name in self._routes)

    async def put(self, route: Route) -> None:
        """Save a route; requests then follow it. Raises Unavailable (STATE_UNWRITABLE), and nothing has changed."""
        await self._state.save(STATE_KIND, route.name, route.SerializeToString(deterministic=True))
        self._routes[route.name] = route

    async def delete(self, name: str) -> None:
        """Delete a route; requests that it routed go on. Raises Unavailable (STATE_UNWRITABLE), and the route stays."""
        await self._state.save(STATE_KIND, name, None)
        del self._routes[name]


def _decoded(name: str, body: bytes) -> Route:
    """Raises DecodeError, ValueError."""
    route = Route.FromString(body)
    if route.name != name or not ROUTE_NAME.fullmatch(name) or not route.targets:
        raise ValueError(f"it is not a route {name!r}")
    return route


def weight_of(target: RouteTarget) -> int:
    return target.weight if target.HasField("weight") else 1


def choose(route: Route, routing_key: str) -> str:
    """The target of a request: by weight, and always the same for one key as long as its target has its share.

    When weights change, only the keys that a target must give up move. Without a key the target is drawn anew. Source:
    weighted rendezvous hashing (Schindelhauer and Schomaker, 2005).
    """
    key = routing_key or secrets.token_hex(16)

    def distance(target: RouteTarget) -> float:
        digest = blake2b("\0".join((route.name, key, target.model)).encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 1) / (1 << 64)  # in (0, 1]
        return -math.log(uniform) / weight_of(target)

    return min((target for target in route.targets if weight_of(target)), key=distance).model
