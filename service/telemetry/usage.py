"""Usage records: a line of JSON for each generation, in a file that grows and is set aside when it is full.

A record is handed to the operating system before the caller can see the end of its generation. So whatever became of
the service afterwards, kill -9 included, the record of every generation that a caller saw end is in the file, once. (A
machine that loses power may lose what its kernel had not written out yet.) A generation that was under way when the
service was killed has no record: nobody was told that it ended.

While the file cannot be written, records wait in memory and generations go on; the log says so.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from service.telemetry.records import CallRecord, GenerationRecord

if TYPE_CHECKING:
    from service.interceptors import Call

logger = logging.getLogger(__name__)


class UsageLog:
    """An observer that appends. The file belongs to one process; full ones are nobody's, to be taken away or kept."""

    def __init__(self, file: Path, rotate_bytes: int) -> None:
        """Raises OSError if the file cannot be opened for appending."""
        self._file = file
        self._rotate_bytes = rotate_bytes
        self._encoder = msgspec.json.Encoder()
        self._waiting = bytearray()  # what could not be written
        self._open()

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        pass

    def call_ended(self, call: Call, record: CallRecord) -> None:
        pass

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        self._waiting += self._encoder.encode(record) + b"\n"
        try:
            self._write()
            if self._size >= self._rotate_bytes:
                self._rotate()
        except OSError as error:
            logger.error(
                "usage records cannot be written to %s (%s): %d bytes of them wait in memory, and are lost if the "
                "service ends before that is mended",
                self._file,
                error.strerror,
                len(self._waiting),
            )

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self) -> None:
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._descriptor).st_size
        if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
            self._waiting[:0] = b"\n"  # an earlier life was stopped in the middle of a line, or the disk was full

    def _write(self) -> None:
        while self._waiting:
            written = os.write(self._descriptor, self._waiting)
            del self._waiting[:written]
            self._size += written

    def _rotate(self) -> None:
        """Under a name that sorts by time and that nothing has yet."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        full = self._file.with_name(f"{self._file.name}.{stamp}-{time.time_ns() % 10**9:09}")
        os.rename(self._file, full)
        before = self._descriptor
        self._open()
        os.close(before)
