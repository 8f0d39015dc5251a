"""The probes of an orchestrator: startup, liveness and readiness.

A port of its own that speaks grpc.health.v1 in plaintext and nothing else, because a kubelet's probes know no TLS and
no credentials. Three names: `startup` serves once every model that is loaded at start has been active; `liveness` while
the process answers and not every model that is to be loaded is given up for good; `readiness` while new requests are
admitted.
"""

from collections.abc import Iterable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from loraplex_service.models.supervisor import EngineState
from loraplex_service.ports.health import NOT_SERVING, SERVING, HealthServicer
from loraplex_service.ports.interceptors import CallInterceptor
from loraplex_service.ports.listeners import ConnectionLimits, bind, options

STARTUP, LIVENESS, READINESS = "startup", "liveness", "readiness"


class Probes:
    """The three answers, kept up to date."""

    def __init__(self, loaded_at_start: Iterable[str]) -> None:
        self.servicer = HealthServicer()
        self._not_yet_active = set(loaded_at_start)
        self._states: dict[str, EngineState] = {}
        self._draining = False
        self._admitting = True

    async def start(self) -> None:
        """Set the statuses that hold before any model has loaded."""
        await self._update()

    async def set_state(self, model: str, state: EngineState) -> None:
        """Note the state of a model. `model`: the bare id."""
        self._states[model] = state
        if state is EngineState.ACTIVE:
            self._not_yet_active.discard(model)
        await self._update()

    async def set_admitting(self, admitting: bool) -> None:
        """Note whether new requests are admitted."""
        self._admitting = admitting
        await self._update()

    async def drain(self) -> None:
        """Report not ready but alive, so that the orchestrator does not kill requests that still run."""
        self._draining = True
        await self._update()

    async def _update(self) -> None:
        states = self._states.values()
        wanted = [state for state in states if state is not EngineState.UNLOADED]
        given_up = bool(wanted) and all(state is EngineState.FAILED for state in wanted)
        ready = self._admitting and not self._draining and EngineState.ACTIVE in states
        for name, serving in ((STARTUP, not self._not_yet_active), (LIVENESS, not given_up), (READINESS, ready)):
            self.servicer.set(name, SERVING if serving else NOT_SERVING)


def build_probe_server(probes: Probes, address: str) -> tuple[grpc.aio.Server, int]:
    """Build the probe server, not started. Returns it and its port. Raises RuntimeError if the address is taken."""
    interceptor = CallInterceptor()
    largest = interceptor.limits.receive.largest([])
    server = grpc.aio.server(interceptors=[interceptor], options=options(ConnectionLimits(), largest))
    health_pb2_grpc.add_HealthServicer_to_server(probes.servicer, server)
    return server, bind(server, address)
