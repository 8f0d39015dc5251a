"""Usage records: a line of JSON for each generation, in a file that grows and is set aside when it is full.

A record is handed to the operating system before the caller can see the end of its generation. So whatever became of
the service afterwards, kill -9 included, the record of every generation that a caller saw end is in the file, once. (A
machine that loses power may lose what its kernel had not written out yet.) A generation that was under way when the
service was killed has no record: nobody was told that it ended.

While the file cannot be written, records wait in memory and generations go on; the log says so. Once too many wait, no
generation is begun until they have been written.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from service.call import Call
from service.errors import Unavailable
from service.telemetry.records import CallRecord, GenerationRecord

logger = logging.getLogger(__name__)


RETRY_SECONDS = 1.0  # between two attempts to write what waits
SET_ASIDE = re.compile(r"\.\d{8}T\d{6}Z-\d{9}")  # what the name of a full file ends with: sorts by time


class UsageLog:
    """An observer that appends. The file belongs to one process; full ones are nobody's, to be taken away or kept."""

    def __init__(self, file: Path, rotate_bytes: int, max_waiting: int = 10_000) -> None:
        """Raises OSError if the file cannot be opened for appending."""
        self.num_waiting = 0  # records that are not in the file, or not whole
        self._file = file
        self._rotate_bytes = rotate_bytes
        self._max_waiting = max_waiting
        self._encoder = msgspec.json.Encoder()
        self._waiting = bytearray()  # what could not be written
        self._watchers: set[asyncio.Event] = set()
        self._tell_full: Callable[[bool], None] = lambda full: None
        self._was_full = self._fails = False
        self._open()

    @property
    def full(self) -> bool:
        """Whether as many records wait as may."""
        return self.num_waiting >= self._max_waiting

    def check_room(self) -> None:
        """Raises Unavailable (USAGE_UNWRITABLE) while no more records may wait."""
        if self.full:
            raise Unavailable(
                "USAGE_UNWRITABLE",
                "what generations use cannot be recorded at this server now; try another replica, or later",
                RETRY_SECONDS,
            )

    def on_full(self, tell: Callable[[bool], None]) -> None:
        """Have it told, on the event loop, whenever `full` changes."""
        self._tell_full = tell

    def files(self) -> list[Path]:
        """Those that are still there, the oldest first. Call it on the event loop, where they are set aside."""
        siblings = (path for path in self._file.parent.iterdir() if path.name.startswith(self._file.name))
        aside = (path for path in siblings if SET_ASIDE.fullmatch(path.name.removeprefix(self._file.name)))
        return [*sorted(aside), *([self._file] if self._file.exists() else [])]

    @contextmanager
    def growth(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever records have been written."""
        grown = asyncio.Event()
        self._watchers.add(grown)
        try:
            yield grown
        finally:
            self._watchers.discard(grown)

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        pass

    def call_ended(self, call: Call, record: CallRecord) -> None:
        pass

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        self._waiting += self._encoder.encode(record) + b"\n"
        self.num_waiting += 1
        self._write_out()

    def adapter_removed(self, name: str) -> None:
        pass

    async def keep_trying(self) -> None:
        """Write what waits as soon as that goes, even if no further generation ends. Never returns."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if self._waiting:
                self._write_out()

    def close(self) -> None:
        if self._waiting:
            self._write_out()
        if self.num_waiting:
            logger.error("%d usage records could not be written to %s, and are lost", self.num_waiting, self._file)
        os.close(self._descriptor)

    def _open(self) -> None:
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._descriptor).st_size
        if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
            self._waiting[:0] = b"\n"  # an earlier life was stopped in the middle of a line, or the disk was full

    def _write_out(self) -> None:
        try:
            self._write()
            if self._size >= self._rotate_bytes:
                self._rotate()
        except OSError as error:
            if not self._fails:
                logger.error(
                    "usage records cannot be written to %s (%s): they wait in memory, and are lost if the service ends "
                    "before that is mended. Once %d wait, no generation is begun",
                    self._file,
                    error.strerror,
                    self._max_waiting,
                )
            self._fails = True
        else:
            if self._fails:
                logger.info("usage records can be written to %s again", self._file)
            self._fails = False
        if self.full is not self._was_full:
            self._was_full = self.full
            self._tell_full(self.full)

    def _write(self) -> None:
        while self._waiting:
            written = os.write(self._descriptor, self._waiting)
            del self._waiting[:written]
            self._size += written
        self.num_waiting = 0
        for grown in self._watchers:
            grown.set()

    def _rotate(self) -> None:
        """Under a name that sorts by time and that nothing has yet."""
        now = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now // 10**9))
        with suppress(FileNotFoundError):  # taken away, or set aside already when no new one could be made
            os.rename(self._file, self._file.with_name(f"{self._file.name}.{stamp}-{now % 10**9:09}"))
        before = self._descriptor
        self._open()
        os.close(before)
