"""Changes of resources on their way to somebody who watches them."""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """The changes that have not been read yet, by resource, in order. Of each resource only the last is kept.

    So it stays as small as there are resources, however slowly it is read. An endless asynchronous iterator.
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
