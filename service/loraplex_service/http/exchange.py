"""One request of HTTP and its answer, over ASGI: bodies of bounded size, JSON, and server-sent events."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl
from uuid import uuid4

import msgspec

from loraplex import LoraplexError
from loraplex_service.http.failures import REQUEST_ID, Failure, Refusal, openai_error

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Admit: TypeAlias = Callable[[], Awaitable[None]]
ResultT = TypeVar("ResultT")
Headers: TypeAlias = Mapping[str, str]

EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
MOST_THROWN_AWAY = 8  # times the largest body
SMALL_BYTES = 64 << 10  # a body's first bytes: they take no room, and nobody asks whose they are
MOST_LEVELS = 32  # of lists and objects in each other: what the contract takes may have as many


@dataclass(slots=True)
class Room:
    """Bounds the bodies that are being received, each and all together. Small ones always have room."""

    body_bytes: int
    waiting_bytes: int
    seconds: float  # for a body to come
    taken: int = 0

    def take(self, size: int, more: int) -> None:
        """Make room for more of a body of which there are `size` bytes. Raises Refusal where there is none."""
        if size + more > self.body_bytes:
            problem = f"the body has more than the {self.body_bytes} bytes that are taken"
            raise Refusal(413, problem, code="message_too_large")
        needed = _beyond_small(size + more) - _beyond_small(size)
        if self.taken + needed > self.waiting_bytes:
            raise Refusal(503, "too many large requests come in at once; try again", code="overloaded", retry_after=1.0)
        self.taken += needed

    def give_back(self, size: int) -> None:
        """Give back what a body of this size took."""
        self.taken -= _beyond_small(size)


class Exchange:
    """A request, and how far its answer is. Whoever answers calls `answer` once, or `begin`, `event`… and `end`."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, room: Room) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.peer = _peer(scope.get("client"))
        self.headers = _joined(scope["headers"])
        self.begun = False
        self.status = 0  # of the answer
        self.request_id = uuid4().hex  # until the service says its own
        self.sent_at = asyncio.get_running_loop().time()  # when something was sent last; at first, when it came
        self.told: Callable[[Failure], Any] = openai_error  # what went wrong, in the words of the API that was called
        self._complete = False  # the body
        self._query_string: bytes = scope.get("query_string", b"")
        self._receive = receive
        self._send = send
        self._room = room

    @property
    def query(self) -> dict[str, str]:
        """What stands behind the path."""
        return dict(parse_qsl(self._query_string.decode("latin-1")))

    async def read(self, admit: Admit, make: Callable[[dict[str, Any]], ResultT]) -> ResultT:
        """Return what is made of the body, which must be a JSON object. Raises Refusal, ConnectionError, LoraplexError.

        `admit`: called before more of a body is kept than a small one has; raises for callers who may send nothing.
        """
        kind, _, more = self.headers.get("content-type", "").lower().partition(";")
        is_encoded = self.headers.get("content-encoding", "identity") != "identity"
        if kind.strip() != "application/json" or is_encoded or ("charset" in more and "utf-8" not in more):
            problem = "the body must be JSON: content-type: application/json, in UTF-8, without a content-encoding"
            raise Refusal(415, problem)
        body = bytearray()
        try:
            await self._receive_into(body, admit)
            if len(body) > SMALL_BYTES:  # in a thread: the loop has others to serve
                return await asyncio.to_thread(lambda: make(_object(body)))
            return make(_object(body))
        finally:
            self._room.give_back(len(body))

    async def _receive_into(self, body: bytearray, admit: Admit) -> None:
        try:
            async with asyncio.timeout(self._room.seconds):
                await self._collect(body, admit)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self._room.seconds:g} s") from None
        except (Refusal, LoraplexError):
            self._room.give_back(len(body))
            body.clear()
            await self._throw_away()
            raise

    async def _collect(self, body: bytearray, admit: Admit) -> None:
        """Take room for the body as it comes: what a caller only promises to send costs others nothing."""
        while (part := await self._next()) is not None:
            if len(body) <= SMALL_BYTES < len(body) + len(part):
                await admit()
            self._room.take(len(body), len(part))
            body += part

    async def _throw_away(self) -> None:
        """Read the rest of a body that is refused: of a caller who still sends, the answer would be lost."""
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(self._room.seconds):
                while (part := await self._next()) is not None and size <= MOST_THROWN_AWAY * self._room.body_bytes:
                    size += len(part)

    async def _next(self) -> bytes | None:
        """The next part of the body; None: there is no more. Raises ConnectionError where the caller left."""
        if self._complete:
            return None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        self._complete = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def gone(self) -> None:
        """Return once the caller has left. To be called when the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, content: Any, status: int = 200, headers: Headers | None = None) -> None:
        """Answer with JSON."""
        await self.page(msgspec.json.encode(content), "application/json", status, headers)

    async def answer_with(self, make: Callable[[], Any], size: int, headers: Headers) -> None:
        """Answer with what is made as JSON. `size`: of what it is made of; of much, it is made in a thread."""
        make_body = partial(_encoded, make)
        body = await asyncio.to_thread(make_body) if size > SMALL_BYTES else make_body()
        await self.page(body, "application/json", headers=headers)

    async def page(self, body: bytes, kind: str, status: int = 200, headers: Headers | None = None) -> None:
        """Answer with bytes of a media type."""
        fixed = {"content-type": kind, "content-length": str(len(body))}
        await self._start(status, {**fixed, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, headers: Headers) -> None:
        """Begin a stream of events."""
        await self._start(200, {**EVENTS, **headers})

    async def event(self, content: Any) -> None:
        """Send one event, by the name of its `type` where it has one. Waits while the caller does not read."""
        name = f"event: {content['type']}\n".encode() if "type" in content else b""
        await self._part(name + b"data: " + msgspec.json.encode(content) + b"\n\n", more=True)

    async def pulse(self, sign: bytes) -> None:
        """Send a sign of life in a stream."""
        await self._part(sign, more=True)

    async def tell(self, failure: Failure) -> None:
        """Answer with what went wrong; in a stream that has begun, as its last event."""
        failure.headers.setdefault(REQUEST_ID, self.request_id)
        if not self.begun:
            await self.answer(self.told(failure), failure.status, failure.headers)
            return
        await self.event(self.told(failure))
        await self.end()

    async def end(self, last: bytes = b"") -> None:
        """End the stream."""
        await self._part(last, more=False)

    async def _start(self, status: int, headers: Headers) -> None:
        self.begun, self.status = True, status
        self.request_id = headers.get(REQUEST_ID, self.request_id)
        told = {REQUEST_ID: self.request_id, "request-id": self.request_id, **headers}
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in told.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _part(self, body: bytes, more: bool) -> None:
        self.sent_at = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


Handler: TypeAlias = Callable[[Exchange], Awaitable[None]]


def telling(content: Mapping[str, object]) -> Handler:
    """Answer all callers alike."""
    return lambda exchange: exchange.answer(content)


def _encoded(make: Callable[[], Any]) -> bytes:
    return msgspec.json.encode(make())


def _object(body: bytearray) -> dict[str, Any]:
    """The JSON object that a body is. Raises Refusal."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    if is_deeper(value, MOST_LEVELS):
        raise Refusal(400, f"the body has more than {MOST_LEVELS} lists and objects in each other")
    return value


def _beyond_small(size: int) -> int:
    return max(0, size - SMALL_BYTES)


def is_deeper(value: Any, most: int) -> bool:
    """Whether JSON has more than `most` lists and objects in each other."""
    level = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
    return bool(level)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _joined(pairs: Any) -> dict[str, str]:
    """The headers by name. Of one that was sent twice the values are joined, as HTTP has it."""
    joined: dict[str, str] = {}
    for key, content in pairs:
        name, value = key.decode("latin-1").lower(), content.decode("latin-1")
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


def _peer(client: Any) -> str:
    """The caller's address, as gRPC writes one."""
    if not client:
        return ""
    host, port = client
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
