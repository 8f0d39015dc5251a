"""A client of the HTTP port that costs little: what it does not need of an answer it passes over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.measure import Record, drive
from benchmarks.workload import Work

EVENT = b"data: "
DONE = b"[DONE]"


class Choice(msgspec.Struct):
    token_ids: list[int] = []


class Chunk(msgspec.Struct):
    choices: list[Choice]


class HttpClient:
    """A connection for each stream."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._decoder = msgspec.json.Decoder(Chunk)

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        body = {
            "model": "bench" if work.adapter is None else f"a{work.adapter:02d}",
            "prompt": work.prompt,
            "temperature": work.temperature,
            "top_p": work.top_p,
            "seed": work.seed,
            "max_tokens": work.output,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        tokens: list[int] = []
        done = asyncio.get_running_loop().create_future()

        def take(event: bytes) -> None:
            if event == DONE:
                done.set_result(None)
                return
            new = [token for choice in self._decoder.decode(event).choices for token in choice.token_ids]
            tokens.extend(new)
            if new:
                on_tokens(len(new))

        transport, _ = await asyncio.get_running_loop().create_connection(lambda: _Events(take, done), *self._place)
        try:
            transport.write(_request(msgspec.json.encode(body)))
            await done
        finally:
            transport.close()
        return tokens

    async def run(self, work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        return await drive(self.generate, work, concurrency)


class _Events(asyncio.Protocol):
    """Takes lines that are events; others are of HTTP, or empty."""

    def __init__(self, take: Callable[[bytes], None], done: asyncio.Future[None]) -> None:
        self._take = take
        self._done = done
        self._begun = b""  # of a line

    def data_received(self, data: bytes) -> None:
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            if line.startswith(EVENT):
                self._take(line.removeprefix(EVENT))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or RuntimeError("the stream ended without [DONE]"))


def _request(body: bytes) -> bytes:
    lines = ("POST /v1/completions HTTP/1.1", "host: bench", "content-type: application/json")
    return "\r\n".join((*lines, f"content-length: {len(body)}", "", "")).encode() + body
