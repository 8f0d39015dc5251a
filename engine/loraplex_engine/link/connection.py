"""The connection to one engine, and the answers from it that callers wait for."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from loraplex_engine.link.messages import ToEngine

T = TypeVar("T")

# Queues a message for the engine and returns at once. It never raises: whoever notices that the engine is gone closes
# the connection.
Send = Callable[[ToEngine], None]


class Connection:
    """Sends messages to one engine, from the start of its process to the end."""

    def __init__(self, send: Send) -> None:
        self.error: Exception | None = None  # why the engine is gone; None: it is there
        self._send = send

    def send(self, message: ToEngine) -> None:
        """Queue a message for the engine. Raises the error with which the engine ended."""
        self.check()
        self._send(message)

    def check(self) -> None:
        """Raise the error with which the engine ended, if it has ended."""
        if self.error is not None:
            raise self.error.with_traceback(None)


def new_answer() -> asyncio.Future[T]:
    """An answer that has not come yet."""
    return asyncio.get_running_loop().create_future()


def resolve(answer: asyncio.Future[T] | None, result: T) -> None:
    """Hand an answer to its callers. None: nobody waits for it."""
    if answer is not None and not answer.done():
        answer.set_result(result)


def reject(answer: asyncio.Future[Any] | None, error: Exception) -> None:
    """End the wait for an answer with an error. None: nobody waits for it."""
    if answer is not None and not answer.done():
        answer.set_exception(error)
        answer.exception()  # marks the exception as retrieved: asyncio would log it if no caller waits
