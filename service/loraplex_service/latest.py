"""A queue of changes for a caller that watches resources."""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """The unread changes, in order. Of each resource only the last change is kept.

    So it never holds more changes than there are resources, however slow the reader. An endless asynchronous iterator.
    """

    def __init__(self) -> None:
        self._changes: dict[str, T] = {}
        self._changed = asyncio.Event()

    def put(self, name: str, change: T) -> None:
        self._changes.pop(name, None)
        self._changes[name] = change
        self._changed.set()

    def __aiter__(self) -> "Latest[T]":
        return self

    async def __anext__(self) -> T:
        while not self._changes:
            self._changed.clear()
            await self._changed.wait()
        return self._changes.pop(next(iter(self._changes)))
