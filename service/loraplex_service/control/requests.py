"""Parts that the requests of all control services share: names, pages, waiting, and request ids."""

import asyncio
import base64
import binascii
import re
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from loraplex_service.call import find_call
from loraplex_service.errors import InvalidRequest
from loraplex_service.timestamps import duration_seconds

T = TypeVar("T")
M = TypeVar("M", bound=Message)

DEFAULT_PAGE_SIZE = 100
PAGE_BYTES = 1 << 20  # of messages; the last one may go beyond: to build and to send them holds up others
REMEMBERED_ANSWERS = 1024  # of each service
REMEMBERED_BYTES = 8 << 20  # of these answers, as they are sent

ID = r"[a-z0-9][a-z0-9._-]{0,62}"
_MODEL = re.compile(rf"models/({ID})")
_TENANT = re.compile(rf"tenants/({ID}|-)")
_ADAPTER = re.compile(rf"tenants/{ID}/adapters/{ID}(@[0-9a-f]{{12,64}})?")


def model_id(name: str, field: str) -> str:
    """The bare id in models/{model}. Raises InvalidRequest."""
    match = _MODEL.fullmatch(name)
    if match is None:
        raise InvalidRequest.at(field, f"{name[:200]!r} is not a name of a model; models/{{model}} is expected")
    return match[1]


def tenant_id(name: str, field: str, all_allowed: bool = False) -> str | None:
    """The bare id in tenants/{tenant}; None for tenants/-, which means all. Raises InvalidRequest."""
    match = _TENANT.fullmatch(name)
    if match is None or (match[1] == "-" and not all_allowed):
        expected = "tenants/{tenant}" + (", or tenants/- for all," if all_allowed else "")
        raise InvalidRequest.at(field, f"{name[:200]!r} is not a name of a tenant; {expected} is expected")
    return None if match[1] == "-" else match[1]


def adapter_name(name: str, field: str, version_allowed: bool = True) -> str:
    """Return the name, after checking its form. Raises InvalidRequest."""
    match = _ADAPTER.fullmatch(name)
    if match is None or (match[1] and not version_allowed):
        expected = "tenants/{tenant}/adapters/{adapter}" + (", with @{version} or without," if version_allowed else "")
        raise InvalidRequest.at(field, f"{name[:200]!r} does not name an adapter here; {expected} is expected")
    return name


# ---- pages -----------------------------------------------------------------------------------------------------------


class PageRequest(Protocol):
    @property
    def page_size(self) -> int: ...

    @property
    def page_token(self) -> str: ...


def page(
    items: Sequence[T], name: Callable[[T], str], message: Callable[[T], M], request: PageRequest
) -> tuple[list[M], str]:
    """Return one page of items in order of names, as messages, and the token of the next. Raises InvalidRequest.

    A page of large messages ends early. The token holds the last name of the page, so pages stay right while items come
    and go.
    """
    size = request.page_size or DEFAULT_PAGE_SIZE
    try:
        after = base64.b64decode(request.page_token.encode(), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequest.at("page_token", "is not a token of an earlier response; leave it out to begin") from None
    start = bisect_right(items, after, key=name)
    shown: list[M] = []
    num_bytes = 0
    for item in islice(items, start, start + size):
        shown.append(message(item))
        num_bytes += shown[-1].ByteSize()
        if num_bytes > PAGE_BYTES:
            break
    end = start + len(shown)
    return shown, "" if end == len(items) else base64.urlsafe_b64encode(name(items[end - 1]).encode()).decode()


# ---- waiting ---------------------------------------------------------------------------------------------------------


class WaitRequest(Protocol):
    @property
    def wait(self) -> Duration: ...


def wait_seconds(request: WaitRequest) -> float:
    """The seconds that the caller wants to wait; 0 where the field is absent."""
    return duration_seconds(request.wait)


async def wait_until(
    condition: Callable[[], bool], subscribe: Callable[[Callable[[object], None]], Callable[[], None]], seconds: float
) -> None:
    """Wait until the condition holds or the time is over. The condition is checked after every reported change."""
    changed = asyncio.Event()
    unsubscribe = subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return
    finally:
        unsubscribe()


# ---- twice -----------------------------------------------------------------------------------------------------------


_Key = tuple[str, str, uuid.UUID]  # tenant, method, request id


class Once:
    """Runs each request id of a tenant once: a repeated id gets the first result, or waits for it.

    A caller that goes away does not stop the work that it began. The latest answers are remembered, as many as there is
    room for; failures are not. For one event loop.
    """

    def __init__(self, capacity: int = REMEMBERED_ANSWERS, max_bytes: int = REMEMBERED_BYTES) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._running: dict[_Key, asyncio.Task[Any]] = {}
        self._answers: OrderedDict[_Key, Message] = OrderedDict()
        self._num_bytes = 0  # of the answers

    async def run(self, method: str, request_id: str, work: Callable[[], Coroutine[Any, Any, M]]) -> M:
        """Run `work` once. `request_id`: "": none, so always run.

        Raises InvalidRequest if it is no UUID, and what `work` raises.
        """
        if not request_id:
            return await work()
        call = find_call()
        try:
            key = (call.tenant if call else "", method, uuid.UUID(request_id))
        except ValueError:
            raise InvalidRequest.at("request_id", f"{request_id[:80]!r} is no UUID") from None
        if key in self._answers:
            return cast(M, self._answers[key])
        if key not in self._running:
            task = self._running[key] = asyncio.create_task(work())
            task.add_done_callback(lambda ended: self._ended(key, ended))
        return cast(M, await asyncio.shield(self._running[key]))

    def _ended(self, key: _Key, task: "asyncio.Task[M]") -> None:
        del self._running[key]
        if not task.cancelled() and task.exception() is None:
            self._remember(key, task.result())  # not the task: it holds its call, and everything that hangs on that

    def _remember(self, key: _Key, answer: Message) -> None:
        self._answers[key] = answer
        self._num_bytes += answer.ByteSize()
        while len(self._answers) > self._capacity or self._num_bytes > self._max_bytes:
            _, forgotten = self._answers.popitem(last=False)
            self._num_bytes -= forgotten.ByteSize()
