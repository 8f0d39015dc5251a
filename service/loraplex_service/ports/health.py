"""grpc.health.v1, so written that no watcher can block the others.

The servicer of grpcio-health-checking holds a lock while it writes: one watcher without a flow-control window stops
every change for everybody.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from loraplex_service.errors import NotFound
from loraplex_service.latest import Latest

Context = grpc.aio.ServicerContext[Any, Any]

SERVING: int = HealthCheckResponse.SERVING
NOT_SERVING: int = HealthCheckResponse.NOT_SERVING


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Reports the last status set for each name."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: defaultdict[str, set[Latest[int]]] = defaultdict(set)
        self._is_final = False

    def set(self, name: str, status: int) -> None:
        """Set the status of a name."""
        if self._is_final or self._statuses.get(name) == status:
            return
        self._statuses[name] = status
        for watcher in self._watchers.get(name, ()):
            watcher.put(name, status)

    def is_serving(self, name: str) -> bool:
        """Whether the last status of a name is SERVING."""
        return self._statuses.get(name) == SERVING

    def end(self) -> None:
        """Report NOT_SERVING for every name, whatever is set afterwards."""
        for name in self._statuses:
            self.set(name, NOT_SERVING)
        self._is_final = True

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:  # noqa: N802
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFound("MODEL_NOT_FOUND", request.service, f"nothing is known of {request.service[:200]!r}")
        return HealthCheckResponse(status=status)

    async def List(self, request: Any, context: Context) -> Any:  # noqa: N802
        statuses = {name: HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # newer than its types

    async def Watch(  # noqa: N802
        self, request: HealthCheckRequest, context: Context
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        name = request.service
        changes = Latest[int]()
        self._watchers[name].add(changes)
        try:
            yield HealthCheckResponse(status=self._statuses.get(name, HealthCheckResponse.SERVICE_UNKNOWN))
            async for status in changes:
                yield HealthCheckResponse(status=status)
        finally:
            self._watchers[name].discard(changes)
            if not self._watchers[name]:
                del self._watchers[name]
