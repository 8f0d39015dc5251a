"""Reading usage records back, from file to file, while others are being written."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import msgspec

from service.errors import NotFound
from service.telemetry.records import GenerationRecord
from service.telemetry.usage import UsageLog

logger = logging.getLogger(__name__)

BATCH_BYTES = 256 << 10  # of a file, read at once


async def usage_records(
    log: UsageLog, after_id: str, existing_only: bool
) -> AsyncGenerator[list[GenerationRecord], None]:
    """The records after the one with this id ("": all), in order, some at a time; then those that are being written.

    Ends, if `existing_only`, when it has come to the last. Raises NotFound (USAGE_RECORD_NOT_FOUND) if the record, or a
    file that was being read, has been taken away.
    """
    with log.growth() as grown, closing(_Reader(log)) as reader:
        if after_id:
            await reader.seek(after_id)
        while True:
            grown.clear()
            if records := await reader.read():
                yield records
            elif existing_only:
                return
            else:
                await grown.wait()


class _Reader:
    """A place in the files of a log. Threads read; files are found and opened on the event loop, which names them."""

    def __init__(self, log: UsageLog) -> None:
        """Begins with the oldest."""
        self._log = log
        self._decoder = msgspec.json.Decoder(GenerationRecord)
        self._file = _open(log.files()[0])

    def close(self) -> None:
        self._file.close()

    async def seek(self, after_id: str) -> None:
        """Go on behind the record with this id. Raises NotFound."""
        for path in reversed(self._log.files()):  # the newest, which alone may be renamed, is opened before any waiting
            try:
                file = _open(path)
            except FileNotFoundError:
                continue  # taken away meanwhile
            self._file.close()
            self._file = file
            place = await asyncio.to_thread(_place_after, file, after_id)
            if place is not None:
                file.seek(place)
                return
        raise _gone(f"no usage file has a record {after_id[:100]!r}", after_id)

    async def read(self) -> list[GenerationRecord]:
        """The next records; none: there are no more by now. Raises NotFound."""
        while True:
            if records := await asyncio.to_thread(self._read):
                return records
            following = self._following()
            if following is None:
                return []
            if records := await asyncio.to_thread(self._read):  # written between the first look and the next file
                following.close()
                return records
            self._file.close()
            self._file = following

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
            logger.warning("a line of %s is no usage record, and passed over: %s", self._file.name, error)
            return None

    def _following(self) -> BinaryIO | None:
        """The file after the one that is being read; None: there is none yet. Raises NotFound."""
        own, following = os.fstat(self._file.fileno()), None
        for path in reversed(self._log.files()):
            if os.path.samestat(path.stat(), own):
                return None if following is None else _open(following)
            following = path
        raise _gone(f"the usage file {self._file.name} was taken away while it was being read", self._file.name)


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _place_after(file: BinaryIO, record_id: str) -> int | None:
    """Of the line after the record's; None: it is not there."""
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
