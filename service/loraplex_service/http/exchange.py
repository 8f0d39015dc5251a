"""One request of HTTP and its answer, over ASGI: bodies of bounded size, JSON, and server-sent events."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from loraplex_service.http.failures import Refusal

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Headers: TypeAlias = Mapping[str, str]

EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
MOST_THROWN_AWAY = 8  # times the largest body


@dataclass(slots=True)
class Room:
    """Bounds the bodies that are being received, each and all together."""

    body_bytes: int
    waiting_bytes: int
    seconds: float  # for a body to come
    taken: int = 0

    def take(self, size: int) -> None:
        """Raises Refusal where there is no room."""
        if self.taken + size > self.waiting_bytes:
            raise Refusal(503, "too many large requests come in at once; try again", code="overloaded", retry_after=1.0)
        self.taken += size

    def give_back(self, size: int) -> None:
        self.taken -= size


class Exchange:
    """A request, and how far its answer is. Whoever answers calls `answer` once, or `begin`, `event`… and `end`."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, room: Room) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.peer = _peer(scope.get("client"))
        self.headers = _joined(scope["headers"])
        self.begun = False
        self.status = 0  # of the answer
        self._complete = False  # the body
        self._receive = receive
        self._send = send
        self._room = room

    async def json(self) -> dict[str, Any]:
        """Return the body, which must be a JSON object. Raises Refusal, and ConnectionError where the caller left."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or self.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "the body must be JSON: content-type: application/json, without a content-encoding")
        try:
            value = msgspec.json.decode(await self._body())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"the body is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise Refusal(400, "the body must be a JSON object")
        return value

    async def _body(self) -> bytes:
        most = self._room.body_bytes
        length = self.headers.get("content-length", "")
        kept, size, body = min(int(length), most) if length.isdecimal() else most, 0, bytearray()
        self._room.take(kept)
        try:
            async with asyncio.timeout(self._room.seconds):
                # What is too large is read and thrown away: of a caller who still sends, the answer would be lost.
                while (part := await self._next()) is not None and size <= MOST_THROWN_AWAY * most:
                    size += len(part)
                    if size <= most:
                        body += part
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self._room.seconds:g} s") from None
        finally:
            self._room.give_back(kept)
        if size > most:
            raise Refusal(413, f"the body has more than the {most} bytes that are taken", code="message_too_large")
        return bytes(body)

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
        body = msgspec.json.encode(content)
        fixed = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, {**fixed, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, headers: Headers) -> None:
        """Begin a stream of events."""
        await self._start(200, {**EVENTS, **headers})

    async def event(self, content: Any) -> None:
        """Send one event. Waits while the caller does not read."""
        await self._part(b"data: " + msgspec.json.encode(content) + b"\n\n", more=True)

    async def end(self, last: bytes = b"") -> None:
        """End the stream."""
        await self._part(last, more=False)

    async def _start(self, status: int, headers: Headers) -> None:
        self.begun, self.status = True, status
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _part(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


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
