"""A file that is read while somebody else writes it."""

from __future__ import annotations

import os
import threading
from io import BufferedIOBase, BufferedReader
from typing import TYPE_CHECKING

from loraplex_adapters.errors import AdapterRejected

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Growth:
    """How much of a file of a known size is there. Told by one thread to another that waits for it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._there = 0
        self._is_over = False
        self._changed = threading.Condition()

    def reach(self, num_bytes: int) -> None:
        """Note that so many bytes are there."""
        with self._changed:
            self._there = num_bytes
            self._changed.notify_all()

    def end(self) -> None:
        """Note that no more bytes come. Whoever waits for some hears of it."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait(self, num_bytes: int) -> None:
        """Wait until so many bytes are there. Raises AdapterRejected if they do not come."""
        with self._changed:
            self._changed.wait_for(lambda: self._there >= num_bytes or self._is_over)
            if self._there < num_bytes:
                raise AdapterRejected([f"its upload ended after {self._there} of {self.size} bytes"])


class GrowingFile(BufferedIOBase):
    """The whole file, as far as its reader can tell: a read waits for the bytes that have not come yet."""

    def __init__(self, file: BufferedReader, growth: Growth) -> None:
        self._file = file
        self._growth = growth

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset, whence = self._growth.size + offset, os.SEEK_SET
        return self._file.seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises AdapterRejected if the bytes do not come."""
        left = self._growth.size - self._file.tell()
        size = left if size is None or size < 0 else min(size, left)
        self._growth.wait(self._file.tell() + size)
        return self._file.read(size)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Raises AdapterRejected if the bytes do not come."""
        self._growth.wait(min(self._file.tell() + memoryview(buffer).nbytes, self._growth.size))
        return self._file.readinto(buffer)
