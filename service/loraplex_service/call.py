"""The state of one call, and access to it from the code that serves the call."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from loraplex.v1.inference_pb2 import Usage


async def _tells_nobody() -> None:
    return


@dataclass(slots=True)
class Call:
    """One call, from its arrival to its status."""

    tenant: str
    is_admin: bool = False  # the caller may do everything, for every tenant
    manages: bool = False  # the caller may use the admin port, at least for its own tenant
    request_id: str = field(default_factory=lambda: secrets.token_hex(8))  # made by the server
    arrival: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    deadline: float | None = None  # by the event loop's clock
    client_request_id: str = ""  # the caller's own id: from the spec, else from x-request-id
    labels: Mapping[str, str] = field(default_factory=dict)  # of the spec
    routing_key: str = ""  # from loraplex-routing-key: equal keys get the same target of a route
    metadata: dict[str, str] = field(default_factory=dict)  # goes back to the caller, beside loraplex-request-id
    admit: Callable[[], Awaitable[None]] = _tells_nobody  # sends the headers, once: no retries after them
    usage: Callable[[], Usage] | None = None  # what a generation has consumed so far: an error carries it
    recorded: bool = False  # its generation has been given to the observer
    trace_id: str = ""  # of the caller's trace, or of one that begins here
    span: object = None  # set by the tracing observer

    def item(self) -> "Call":
        """A call for one item of this batch, as if the item had been sent alone."""
        return Call(
            self.tenant,
            deadline=self.deadline,
            client_request_id=self.client_request_id,
            routing_key=self.routing_key,
            trace_id=self.trace_id,
            span=self.span,
        )

    def let_go(self) -> None:
        """Drop references that lead back to the call, once it has ended, so that its memory is freed at once."""
        self.admit = _tells_nobody
        self.usage = None

    def seconds_left(self) -> float | None:
        """Seconds until the caller's deadline; None: it set none."""
        return None if self.deadline is None else self.deadline - asyncio.get_running_loop().time()

    def used_tokens(self) -> int:
        """Tokens of the prompt and the outputs so far."""
        if self.usage is None:
            return 0
        usage = self.usage()
        return usage.prompt_tokens + usage.completion_tokens


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running task serves. Raises LookupError if it serves none."""
    return _CALL.get()


def find_call() -> Call | None:
    """The call that the running task serves; None: it serves none."""
    return _CALL.get(None)


@contextmanager
def serving(call: Call) -> Iterator[None]:
    """Make this the current call for the length of the block."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def sees_inside(owner: str) -> bool:
    """Whether the caller may see paths and usage of this tenant's resources: True for its own, for an ADMIN, and
    outside of a call.
    """
    call = find_call()
    return call is None or call.is_admin or call.tenant == owner
