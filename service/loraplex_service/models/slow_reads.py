"""Reads of files whose file system may never answer."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def begin_read(read: Callable[[], T]) -> "asyncio.Future[T]":
    """Begin to read → what comes of it, for this event loop.

    Each read has a thread of its own. One that stands still for ever then takes no thread from others, and the end of
    the process does not wait for it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            found = read()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(found)

    future.set_running_or_notify_cancel()  # whoever no longer waits for it does not change how it ends
    Thread(target=run, name="slow-read", daemon=True).start()
    return asyncio.wrap_future(future)
