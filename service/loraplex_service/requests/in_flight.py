"""The requests in flight, by their ids, so that one can be ended from outside, whether it waits or runs."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from loraplex.v1.inference_pb2 import Usage
from loraplex_service.call import Call
from loraplex_service.errors import Cancelled, DeadlineExceeded, LoraplexError
from loraplex_service.telemetry.records import GenerationRecord

# At its deadline gRPC ends a call at both of its ends, and nothing that the server says arrives any more.
MAX_MARGIN_SECONDS = 0.02  # before it: what a status may take to the caller
MARGIN_SHARE = 0.05  # of the time that the caller gave, where that is less


class Work(Protocol):
    """What an engine does for one request."""

    def usage(self) -> Usage:
        """The tokens consumed so far."""

    def record(self, status: str, trace_id: str) -> GenerationRecord:
        """The request's record. `status`: the name of the gRPC status that it ends with."""

    def end(self, error: Exception) -> None:
        """Stop the engine's work at once, and have whoever waits for it get this error."""

    def close(self) -> None:
        """Stop the engine's work, if it has not ended."""


class InFlight:
    """One request, from the moment when its id may be known until its end."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._work: Work | None = None
        self._waiting: asyncio.Timeout | None = None
        self._error: LoraplexError | None = None

    @property
    def missed_deadline(self) -> DeadlineExceeded | None:
        """The error that ended the request, if that was its deadline; else None."""
        return self._error if isinstance(self._error, DeadlineExceeded) else None

    def end(self, error: LoraplexError) -> None:
        """End the request with this error: at once if it runs or waits, else as soon as it does.

        The first error counts.
        """
        if self._error is not None:
            return
        self._error = error
        if self._work is not None:
            self._work.end(error)
        elif self._waiting is not None:
            self._waiting.reschedule(0)

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Mark the request as waiting for the length of the block. Raises the error given to `end`."""
        try:
            async with asyncio.timeout(None if self._error is None else 0) as self._waiting:
                yield
        except TimeoutError:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._waiting = None

    def runs(self, work: Work) -> None:
        """Note that the request runs: `end` ends this work from now on."""
        self._work = work
        if self._error is not None:
            work.end(self._error)


def end_before(deadline: float, request: InFlight) -> asyncio.TimerHandle:
    """End the request shortly before its deadline, so that the caller still receives the status and the usage."""
    margin = min(MAX_MARGIN_SECONDS, MARGIN_SHARE * (deadline - request.call.arrival))
    problem = "the call's deadline is over; ask for fewer tokens, set a time_limit below it, or give it longer"
    return asyncio.get_running_loop().call_at(deadline - margin, request.end, DeadlineExceeded(problem))


class Requests:
    """All requests in flight."""

    def __init__(self) -> None:
        self._by_id: dict[str, InFlight] = {}

    @contextmanager
    def known(self, call: Call) -> Iterator[InFlight]:
        """Make the request known by its ids for the length of the block."""
        request = self._by_id[call.request_id] = InFlight(call)
        timer = None if call.deadline is None else end_before(call.deadline, request)
        try:
            yield request
        finally:
            if timer is not None:
                timer.cancel()
            del self._by_id[call.request_id]

    def cancel(self, tenant: str, request_ids: Collection[str], client_request_ids: Collection[str]) -> list[str]:
        """End the tenant's requests with one of these ids, the server's or the caller's. Returns their request ids."""
        chosen = [
            call.request_id
            for call in (request.call for request in self._by_id.values())
            if call.tenant == tenant
            and (call.request_id in request_ids or call.client_request_id in client_request_ids)
        ]
        for request_id in chosen:
            self._by_id[request_id].end(Cancelled(f"request {request_id} was cancelled by CancelGeneration"))
        return chosen

    def end_all(self, error: LoraplexError) -> None:
        for request in self._by_id.values():
            request.end(error)
