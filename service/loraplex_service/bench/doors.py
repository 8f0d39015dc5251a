"""Doors of a server through which a benchmark sends requests: gRPC by the client library, and HTTP at little cost."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from loraplex import AsyncClient, LoraplexError
from loraplex_service.bench.loops import RequestError
from loraplex_service.bench.plans import Request

EVENT = b"data: "
DONE = b"[DONE]"
STATUS, OK = b"HTTP/1.1 ", b"HTTP/1.1 200"
MOST_OF_AN_ERROR = 200  # characters of a body that are told
MOST_OF_A_LINE = 1 << 20  # bytes, of an event; and of a whole refusal


class GrpcDoor:
    """The data port, as callers of the client library have it."""

    def __init__(self, client: AsyncClient, temperature: float, top_p: float) -> None:
        self._client = client
        self._temperature, self._top_p = temperature, top_p

    async def __call__(self, request: Request, on_tokens: Callable[[int], None]) -> list[int]:
        stream = self._client.stream_generate(
            request.model,
            request.prompt,
            max_tokens=request.output,
            ignore_eos=True,
            seed=request.seed,
            token_ids=True,
            temperature=self._temperature,
            top_p=self._top_p,
        )
        tokens: list[int] = []
        try:
            async for event in stream:
                if event.HasField("delta"):
                    new = event.delta.token_ids
                    tokens.extend(new)
                    if new:  # not text alone, which was held back
                        on_tokens(len(new))
        except LoraplexError as error:
            raise RequestError(str(error)) from error
        if len(tokens) != request.output:
            raise RequestError(f"{len(tokens)} tokens came instead of {request.output}")
        return tokens


class Choice(msgspec.Struct):
    token_ids: list[int] = []


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    error: msgspec.Raw | None = None


class HttpStreams:
    """Streams of /v1/completions, a connection each. What is not needed of an answer is passed over."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> None:
        """`seconds`: that an answer may take; None: as long as it likes."""
        self._host, self._port, self._tls = host, port, tls
        self._seconds = seconds
        self._headers = dict(headers or {})
        self._decoder = msgspec.json.Decoder(Chunk)

    async def stream(self, body: Mapping[str, Any], on_tokens: Callable[[int], None]) -> list[int]:
        """The token ids of the answer. Raises RequestError."""
        tokens: list[int] = []
        done = asyncio.get_running_loop().create_future()

        def take(event: bytes) -> None:
            if event == DONE:
                if not done.done():
                    done.set_result(None)
                return
            chunk = self._decoder.decode(event)
            if chunk.error is not None:
                raise RequestError(bytes(chunk.error).decode()[:MOST_OF_AN_ERROR])
            new = [token for choice in chunk.choices for token in choice.token_ids]
            tokens.extend(new)
            if new:
                on_tokens(len(new))

        try:
            async with asyncio.timeout(self._seconds):
                await self._exchange(msgspec.json.encode(body), lambda: _Events(take, done), done)
        except TimeoutError as error:
            raise RequestError(f"it takes more than {self._seconds:g} s") from error
        except OSError as error:
            raise RequestError(str(error)) from error
        return tokens

    async def _exchange(self, body: bytes, events: Callable[[], "_Events"], done: "asyncio.Future[None]") -> None:
        """Send a request, and wait for the end of its answer. Raises RequestError, OSError."""
        transport, _ = await asyncio.get_running_loop().create_connection(events, self._host, self._port, ssl=self._tls)
        try:
            transport.write(self._request(body))
            await done
        finally:
            transport.abort()

    def _request(self, body: bytes) -> bytes:
        headers = {
            "host": self._host,
            "connection": "close",  # so that a refusal has an end
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        lines = [f"{name}: {value}" for name, value in (headers | self._headers).items()]
        return "\r\n".join(("POST /v1/completions HTTP/1.1", *lines, "", "")).encode() + body


class HttpDoor:
    """The HTTP port, with OpenAI's API."""

    def __init__(self, streams: HttpStreams, temperature: float, top_p: float) -> None:
        self._streams = streams
        self._sampling = {"temperature": temperature, "top_p": top_p}

    async def __call__(self, request: Request, on_tokens: Callable[[int], None]) -> list[int]:
        body = completion_body(request.model, request.prompt, request.output, seed=request.seed, **self._sampling)
        tokens = await self._streams.stream(body, on_tokens)
        if len(tokens) != request.output:
            raise RequestError(f"{len(tokens)} tokens came instead of {request.output}")
        return tokens


def completion_body(model: str, prompt: Any, output: int, **sampling: float | None) -> dict[str, Any]:
    """The body of a streamed completion that has exactly so many tokens, with their ids."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        **sampling,
    }


class _Events(asyncio.Protocol):
    """Takes lines that are events; others are of HTTP, or empty. A refusal is read to its end."""

    def __init__(self, take: Callable[[bytes], None], done: "asyncio.Future[None]") -> None:
        self._take = take
        self._done = done
        self._begun = b""  # of a line
        self._refused = b""  # what came, where the status is not 200

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._refused += data[: MOST_OF_A_LINE - len(self._refused)]
            if len(self._refused) >= MOST_OF_A_LINE:
                self._fail(self._why())
            return
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            if line.startswith(EVENT):
                self._taken(line.removeprefix(EVENT))
            elif line.startswith(STATUS) and not line.startswith(OK):
                self._refused = data
                return
        if len(self._begun) > MOST_OF_A_LINE:
            self._fail(f"a line of the answer has more than {MOST_OF_A_LINE >> 20} MiB")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(self._why() or str(error or "the stream ended without [DONE]"))

    def _why(self) -> str:
        """What a refusal says."""
        return self._refused.partition(b"\r\n\r\n")[2][: 4 * MOST_OF_AN_ERROR].decode(errors="replace")[
            :MOST_OF_AN_ERROR
        ]

    def _taken(self, event: bytes) -> None:
        try:
            self._take(event)
        except (RequestError, msgspec.DecodeError) as failure:
            self._fail(str(failure))

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(RequestError(why))
