"""Connections without a request do not stay for ever, nor in the way of others: to uvicorn all are the same."""

import asyncio
from typing import Any


class Connections:
    """Those that are open, the one first that has been silent for longest."""

    def __init__(self, most: int) -> None:
        """`most`: beyond so many, uvicorn answers none."""
        self._most = most
        self._open: dict[PatientProtocol, None] = {}

    def opened(self, connection: "PatientProtocol") -> None:
        """Add one. Where there is no room for it, close that which has waited longest for a request."""
        if len(self._open) + 1 >= self._most:
            idle = next((one for one in self._open if one.is_idle), None)
            if idle is not None:
                idle.close()
        self._open[connection] = None

    def heard(self, connection: "PatientProtocol") -> None:
        """Put one at the end, which has said something. One that is being closed may still do so."""
        if connection in self._open:
            self._open[connection] = self._open.pop(connection)

    def closed(self, connection: "PatientProtocol") -> bool:
        """Forget one, and say whether it was open."""
        return self._open.pop(connection, self) is None


class PatientProtocol(asyncio.Protocol):
    """Passes everything on to uvicorn's protocol, and looks whether it waits for a request's head.

    It is closed when that does not come in time.
    """

    def __init__(self, protocol: Any, seconds: float, connections: Connections) -> None:
        self._protocol = protocol
        self._connections = connections
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._connections.opened(self)
        self._protocol.connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._connections.heard(self)
        self._protocol.data_received(data)
        self._look()

    def eof_received(self) -> bool | None:
        kept: bool | None = self._protocol.eof_received()
        return kept

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connections.closed(self):
            self._stop()
            self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    @property
    def is_idle(self) -> bool:
        """Whether the head of a request is waited for."""
        cycle = self._protocol.cycle
        return cycle is None or cycle.response_complete

    def close(self) -> None:
        """Close it at once: what was not sent yet is an answer's that nobody reads."""
        self._transport.abort()
        self.connection_lost(None)  # the loop would say so later

    def _look(self) -> None:
        """Start the timer where a head is waited for, and stop it where one is complete."""
        if not self.is_idle:
            self._stop()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
