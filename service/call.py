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
    is_admin: bool = False  # its caller may do everything, for every tenant
    request_id: str = field(default_factory=lambda: secrets.token_hex(8))  # never the caller's: that is a label
    arrival: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    deadline: float | None = None  # of the event loop's clock
    client_request_id: str = ""  # what the caller calls it; of the spec, else of the metadata x-request-id
    labels: Mapping[str, str] = field(default_factory=dict)  # of the spec
    routing_key: str = ""  # of the metadata loraplex-routing-key: the same one, the same target of a route
    metadata: dict[str, str] = field(default_factory=dict)  # goes back to the caller, beside loraplex-request-id
    admit: Callable[[], Awaitable[None]] = _tells_nobody  # sends that metadata, once: it ends the right to retry
    usage: Callable[[], Usage] | None = None  # what a generation has consumed so far: an error carries it
    recorded: bool = False  # its generation has been given to the observer
    trace_id: str = ""  # of the caller's trace, or of the one that began here
    span: object = None  # of whoever traces

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
        """Of what leads back to the call, once it has ended: so that it goes at once, and all that hangs on it."""
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
