"""A caller of the door in its own process: ASGI without a server, in front of a real service with a scripted engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from loraplex_service.http.door import Door
from loraplex_service.http.exchange import Room
from loraplex_service.http.service import Clients

BODY_BYTES = 1 << 20
Json = dict[str, Any]


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Json:
        """Of an answer that is an error."""
        assert self.status >= 400, self.body
        error: Json = self.json["error"]
        return error

    @property
    def events(self) -> list[Any]:
        """Of a stream; `[DONE]` as it is."""
        assert self.headers["content-type"].startswith("text/event-stream")
        return [_event(part) for part in self.body.decode().split("\n\n") if part]


def _event(part: str) -> Any:
    """The content of an event, whose name must be its type where it has one."""
    name, _, data = part.partition("data: ")
    if data == "[DONE]":
        return data
    content = json.loads(data)
    assert name == (f"event: {content['type']}\n" if "type" in content else "")
    return content


@dataclass
class Caller:
    """Makes requests of the door. `leave`: set by a test to have the caller go away."""

    door: Door
    clients: Clients
    model: str = "tiny"
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    heard: asyncio.Event = field(default_factory=asyncio.Event)  # the first part of a stream came
    holds_back: bool = False  # promises more of each body than it sends; `heard` says that this was taken

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.request("GET", path, b"", headers or {})

    async def post(self, path: str, content: Any, headers: Mapping[str, str] | None = None) -> Answer:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await self.request("POST", path, body, {"content-type": "application/json"} | dict(headers or {}))

    async def chat(self, said: str = "hi", **parameters: Any) -> Answer:
        conversation = {"model": self.model, "messages": [{"role": "user", "content": said}], "max_tokens": 4}
        return await self.post("/v1/chat/completions", conversation | parameters)

    async def message(self, said: Any = "hi", **parameters: Any) -> Answer:
        turns = {"model": self.model, "messages": [{"role": "user", "content": said}], "max_tokens": 4}
        return await self.post("/v1/messages", turns | parameters)

    async def respond(self, said: Any = "hi", **parameters: Any) -> Answer:
        return await self.post(
            "/v1/responses", {"model": self.model, "input": said, "max_output_tokens": 4} | parameters
        )

    async def complete(self, prompt: Any = "ab", **parameters: Any) -> Answer:
        return await self.post("/v1/completions", {"model": self.model, "prompt": prompt, "max_tokens": 4} | parameters)

    @asynccontextmanager
    async def held_up(self, size: int, declared: int | None = None) -> AsyncIterator[None]:
        """Another caller, of whose large body so much has come, and who leaves at the end of the block."""
        another = Caller(self.door, self.clients, self.model, holds_back=True)
        headers = {"content-type": "application/json", "content-length": str(declared or size)}
        asked = asyncio.create_task(another.request("POST", "/tokenize", b"x" * size, headers))
        await another.heard.wait()
        yield
        another.leave.set()
        await asked

    async def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        answer, parts = Answer(), [body]

        async def receive() -> Json:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": self.holds_back}
            if self.holds_back:
                self.heard.set()
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {key.decode(): value.decode() for key, value in message["headers"]}
            else:
                answer.body += message["body"]
                self.heard.set()

        pairs = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
        client = ("127.0.0.1", 40000)
        scope = {"type": "http", "method": method, "path": path, "headers": pairs, "client": client}
        await self.door(scope, receive, send)
        return answer


@asynccontextmanager
async def caller_of(address: str, model: str = "tiny", admin: str | None = None) -> AsyncIterator[Caller]:
    """A caller of a door in front of the service at this address. `admin`: of its admin port."""
    clients, room = Clients(address, calls_per_client=64), Room(BODY_BYTES, 2 * BODY_BYTES, seconds=20.0)
    managing = Clients(admin or address, calls_per_client=64)
    try:
        yield Caller(Door(clients, room, "1.2.3", None if admin is None else managing), clients, model)
    finally:
        await clients.close()
        await managing.close()
