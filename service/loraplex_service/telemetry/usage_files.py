"""The files of usage records: one that grows, and the rotated ones.

Every method may block on the disk, so call it in a thread of its own.
"""

import calendar
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

SET_ASIDE = re.compile(r"\.(\d{8}T\d{6}Z)-(\d{9})")  # what the name of a full file ends with: sorts by time
STAMP = "%Y%m%dT%H%M%SZ"
SECOND = 10**9  # in nanoseconds


class UsageFiles:
    """The files of one log. One thread appends; any may read."""

    def __init__(self, file: Path, rotate_bytes: int, clock: Callable[[], int] = time.time_ns) -> None:
        """Open the file for appending. Raises OSError if that fails."""
        self._file = file
        self._rotate_bytes = rotate_bytes
        self._clock = clock
        self._left: deque[bytes] = deque()  # whole lines, of which the first may be written in part
        self._offset = 0  # of the rest of the first
        self._naming = threading.Lock()  # held while a file gets another name
        self._descriptor = self._open()

    def append(self, lines: Sequence[bytes]) -> None:
        """Write these records after those left from earlier calls.

        Raises OSError; the rest then waits for the next call.
        """
        self._left.extend(lines)
        if not self._is_there():  # somebody took it away
            self._reopen()
        while self._left:
            self._write_first()
            if self._size >= self._rotate_bytes:
                self._rotate()

    def close(self) -> None:
        os.close(self._descriptor)

    def oldest(self) -> BinaryIO | None:
        """Open the oldest file; None: there is none. Raises OSError."""
        with self._naming:
            paths = self._paths()
            return paths[0].open("rb") if paths else None

    def newest_first(self) -> Iterator[BinaryIO]:
        """Open all files, one after the other; the caller closes each. Raises OSError."""
        with self._naming:  # the newest alone may get another name
            paths = self._paths()
            newest = paths.pop().open("rb") if paths else None
        if newest is not None:
            yield newest
        for path in reversed(paths):
            try:
                yield path.open("rb")
            except FileNotFoundError:
                continue  # taken away meanwhile

    def following(self, file: BinaryIO) -> BinaryIO | None:
        """Open the file after this one; None: there is none yet.

        Raises LookupError if this file has been taken away, OSError.
        """
        own, following = os.fstat(file.fileno()), None
        with self._naming:
            for path in reversed(self._paths()):
                if os.path.samestat(path.stat(), own):
                    return None if following is None else following.open("rb")
                following = path
        raise LookupError(f"the usage file {file.name} was taken away while it was being read")

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        """The paths of the regular files, the oldest first."""
        try:
            names = os.listdir(self._file.parent)
        except FileNotFoundError:
            return []
        aside = sorted(name for name in names if self._stamp(name) is not None)
        paths = [self._file.with_name(name) for name in (*aside, *({self._file.name} & set(names)))]
        return [path for path in paths if _is_file(path)]

    def _stamp(self, name: str) -> int | None:
        """The time in the name of a rotated file, in nanoseconds; None: it is no rotated file."""
        found = SET_ASIDE.fullmatch(name.removeprefix(self._file.name)) if name.startswith(self._file.name) else None
        return None if found is None else calendar.timegm(time.strptime(found[1], STAMP)) * SECOND + int(found[2])

    def _open(self) -> int:
        descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(descriptor).st_size
        self._offset = 0  # what another file has of the first line it keeps
        if self._size and os.pread(descriptor, 1, self._size - 1) != b"\n":
            self._left.appendleft(b"\n")  # an earlier life was stopped in the middle of a line, or the disk was full
        return descriptor

    def _reopen(self) -> None:
        before, self._descriptor = self._descriptor, self._open()
        os.close(before)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._file.stat())
        except FileNotFoundError:
            return False

    def _write_first(self) -> None:
        line = self._left[0]
        while self._offset < len(line):
            written = os.write(self._descriptor, line[self._offset :])
            self._offset += written
            self._size += written
        self._left.popleft()
        self._offset = 0

    def _rotate(self) -> None:
        """Rotate the file, to a name that sorts behind all others even if the clock was set back."""
        with self._naming:
            stamps = (self._stamp(name) for name in os.listdir(self._file.parent))
            now = max(self._clock(), 1 + max((stamp for stamp in stamps if stamp is not None), default=0))
            stamp = time.strftime(STAMP, time.gmtime(now // SECOND))
            self._file.rename(self._file.with_name(f"{self._file.name}.{stamp}-{now % SECOND:09}"))
            self._reopen()


def _is_file(path: Path) -> bool:
    """Whether the path is a regular file.

    Reading a pipe or a device would take records from its reader, or never end.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
