"""Answers over HTTP that no server should give."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from loraplex_service.bench import doors
from loraplex_service.bench.doors import HttpStreams
from loraplex_service.bench.loops import RequestError
from tests.waits import MOST_SECONDS

Answer = Callable[[asyncio.StreamWriter], None]


@asynccontextmanager
async def answering(write: Answer) -> AsyncIterator[int]:
    """A server that answers so, and keeps the connection open until its caller leaves."""
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        write(writer)
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        left.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await left.wait()


def silence(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")


def refusal(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Busy\r\n\r\nbusy now")
    writer.write(b"." * (2 * doors.MOST_OF_A_LINE))


def line(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: " + b"." * (2 * doors.MOST_OF_A_LINE))


@pytest.mark.parametrize(
    ("write", "seconds", "problem"),
    [
        (silence, 0.1, "takes more than 0.1 s"),
        (refusal, None, "busy now"),
        (line, None, "a line of the answer has more than 1 MiB"),
    ],
)
async def test_an_answer_without_end_ends(write: Answer, seconds: float | None, problem: str) -> None:
    async with answering(write) as port, asyncio.timeout(MOST_SECONDS):
        with pytest.raises(RequestError, match=problem):
            await HttpStreams("127.0.0.1", port, seconds=seconds).stream({}, lambda count: None)


async def test_an_answer_may_say_twice_that_it_has_ended() -> None:
    async with answering(lambda writer: writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\ndata: [DONE]\n")) as port:
        assert await HttpStreams("127.0.0.1", port).stream({}, lambda count: None) == []
