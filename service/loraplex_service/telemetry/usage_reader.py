"""Reads usage records back, from file to file, while new ones are being written."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from functools import partial
from typing import BinaryIO, TypeVar

import msgspec

from loraplex_service.errors import NotFound, Unavailable
from loraplex_service.telemetry.records import GenerationRecord
from loraplex_service.telemetry.usage import RETRY_SECONDS, UsageLog
from loraplex_service.telemetry.usage_files import UsageFiles

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_BYTES = 256 << 10  # of a file, read at once


async def usage_records(
    log: UsageLog, after_id: str, existing_only: bool
) -> AsyncGenerator[list[GenerationRecord], None]:
    """Yield the records after the one with this id ("": all), in order, in batches; then new ones as they are written.

    With `existing_only` it ends at the last record. Raises NotFound (USAGE_RECORD_NOT_FOUND) if the record, or a file
    that was being read, has been taken away, and Unavailable (USAGE_UNREADABLE) if no file can be read.
    """
    with log.growth() as grown, closing(await _reading(log, partial(_Reader, log.files, after_id))) as reader:
        while True:
            grown.clear()
            if records := await _reading(log, reader.read):
                yield records
            elif existing_only:
                return
            else:
                await grown.wait()


async def _reading(log: UsageLog, read: Callable[[], T]) -> T:
    try:
        return await log.reading(read)
    except OSError as error:
        raise _unreadable(str(error)) from error


class _Reader:
    """A position in the files of a log. For one thread at a time."""

    def __init__(self, files: UsageFiles, after_id: str) -> None:
        """Begin at the oldest record, or after the one with this id. Raises NotFound, Unavailable, OSError."""
        self._files = files
        self._decoder = msgspec.json.Decoder(GenerationRecord)
        self._file = self._behind(after_id) if after_id else self._oldest()

    def close(self) -> None:
        self._file.close()

    def read(self) -> list[GenerationRecord]:
        """The next records; empty: there are no more by now. Raises NotFound, OSError."""
        while not (records := self._read()):
            following = self._following()
            if following is None:
                return []
            if records := self._read():  # written between the first look and the next file
                following.close()
                return records
            self._file.close()
            self._file = following
        return records

    def _oldest(self) -> BinaryIO:
        file = self._files.oldest()
        if file is None:
            raise _unreadable("there are none now")
        return file

    def _behind(self, after_id: str) -> BinaryIO:
        for file in self._files.newest_first():
            place = _place_after(file, after_id)
            if place is not None:
                file.seek(place)
                return file
            file.close()
        raise _gone(f"no usage file has a record {after_id[:100]!r}", after_id)

    def _following(self) -> BinaryIO | None:
        try:
            return self._files.following(self._file)
        except LookupError as error:
            raise _gone(str(error.args[0]), self._file.name) from error

    def _read(self) -> list[GenerationRecord]:
        while lines := self._file.readlines(BATCH_BYTES):
            if not lines[-1].endswith(b"\n"):  # it is being written
                self._file.seek(-len(lines.pop()), os.SEEK_CUR)
                if not lines:
                    return []
            if records := [record for line in lines if (record := self._decoded(line)) is not None]:
                return records
        return []

    def _decoded(self, line: bytes) -> GenerationRecord | None:
        try:
            return self._decoder.decode(line)
        except msgspec.DecodeError as error:  # the service was stopped in the middle of it: nobody saw that one end
            logger.warning("a line of %s is not a usage record, and was skipped: %s", self._file.name, error)
            return None


def _place_after(file: BinaryIO, record_id: str) -> int | None:
    """The offset of the line after the record; None: the file does not hold the record."""
    if not os.fstat(file.fileno()).st_size:
        return None
    key = b'{"id":' + msgspec.json.encode(record_id) + b","
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(key)
        while start > 0 and content[start - 1] != ord("\n"):  # a part of a line that was cut
            start = content.find(key, start + 1)
        end = content.find(b"\n", start) if start >= 0 else -1
        return end + 1 if end >= 0 else None


def _gone(problem: str, name: str) -> NotFound:
    return NotFound("USAGE_RECORD_NOT_FOUND", name, f"{problem}; leave after_id out to begin with the oldest there is")


def _unreadable(why: str) -> Unavailable:
    return Unavailable("USAGE_UNREADABLE", f"the files of the usage records cannot be read: {why}", RETRY_SECONDS)
