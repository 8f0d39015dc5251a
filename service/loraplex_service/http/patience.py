"""A connection that is closed when the head of a request does not come in time: uvicorn would wait for ever."""

import asyncio
from typing import Any


class PatientProtocol(asyncio.Protocol):
    """Passes everything on to uvicorn's protocol, and looks whether it waits for a request's head."""

    def __init__(self, protocol: Any, seconds: float) -> None:
        self._protocol = protocol
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._protocol.connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)
        self._look()

    def eof_received(self) -> bool | None:
        kept: bool | None = self._protocol.eof_received()
        return kept

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def _look(self) -> None:
        """Start the timer where a head is waited for, and stop it where one is complete."""
        cycle = self._protocol.cycle
        if cycle is not None and not cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
