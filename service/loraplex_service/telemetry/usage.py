"""Usage records: a line of JSON for each generation, in a file that is rotated when it is full.

A record is handed to the operating system before the caller can see the end of its generation. So whatever happens to
the service afterwards, kill -9 included, the file has one record of every generation whose end a caller saw. (A
machine that loses power may lose what its kernel had not written out yet.) A generation that was under way when the
service was killed has no record: nobody was told that it ended.

While writing fails or takes long, records wait in memory and generations go on; the log says so. Once too many wait, no
generation is begun until they have been written. A separate thread writes, so that a disk that does not answer blocks
no caller.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import msgspec

from loraplex_service.call import Call
from loraplex_service.errors import Unavailable
from loraplex_service.telemetry.records import CallRecord, GenerationRecord
from loraplex_service.telemetry.usage_files import UsageFiles

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 1.0  # between two attempts to write what waits
STUCK_SECONDS = 1.0  # the longest wait of a generation's end for its record
READERS = 2  # threads for all readers of records


class UsageLog:
    """An observer that appends records. For one event loop. One process owns the file; full files are free to be
    taken away or kept."""

    def __init__(self, file: Path, rotate_bytes: int, max_waiting: int = 10_000) -> None:
        """Open the file for appending. Raises OSError if that fails."""
        self.files = UsageFiles(file, rotate_bytes)
        self._file = file
        self._max_waiting = max_waiting
        self._encoder = msgspec.json.Encoder()
        self._lines: list[bytes] = []  # records that the writer has not been given
        self._num_noted = self._num_given = self._num_written = 0  # records
        self._watchers: set[asyncio.Event] = set()
        self._tell_full: Callable[[bool], None] = lambda full: None
        self._was_full = self._fails = False
        self._loop = asyncio.get_running_loop()
        self._writing = self._loop.create_future()  # the batch that the writer has been given last
        self._writing.set_result(None)
        self._batches: SimpleQueue[list[bytes] | None] = SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, "usage-read")
        # A daemon: a write that never ends must not keep the service from ending.
        threading.Thread(target=self._write_batches, name="usage-write", daemon=True).start()

    @property
    def num_waiting(self) -> int:
        """The number of records that are not wholly in the file yet."""
        return self._num_noted - self._num_written

    @property
    def full(self) -> bool:
        """Whether the limit of waiting records is reached."""
        return self.num_waiting >= self._max_waiting

    def check_room(self) -> None:
        """Raise Unavailable (USAGE_UNWRITABLE) while the limit of waiting records is reached."""
        if self.full:
            raise Unavailable(
                "USAGE_UNWRITABLE",
                "usage records cannot be written at this server now; try another replica, or later",
                RETRY_SECONDS,
            )

    def on_full(self, tell: Callable[[bool], None]) -> None:
        """Call `callback` on the event loop whenever `full` changes."""
        self._tell_full = tell

    async def written(self) -> None:
        """Wait until all earlier records are in the file: at most STUCK_SECONDS, and not at all while writing fails."""
        wanted = self._num_noted
        while self._num_written < wanted and not self._fails:
            done, _ = await asyncio.wait({self._writing}, timeout=STUCK_SECONDS)
            if not done:
                self._say_failing(f"it has taken longer than {STUCK_SECONDS:g} s")

    async def reading(self, read: Callable[[], T]) -> T:
        """Run `read` in the thread for reading. Returns and raises what it does."""
        return await self._loop.run_in_executor(self._readers, read)

    @contextmanager
    def growth(self) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever records have been written."""
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
        self._lines.append(self._encoder.encode(record) + b"\n")
        self._num_noted += 1
        self._write_soon()
        self._tell_if_full()

    def adapter_removed(self, name: str) -> None:
        pass

    async def keep_trying(self) -> None:
        """Retry to write waiting records, and make the file again if it was taken away, even if no further
        generation ends. Never returns."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            self._write_soon()

    async def close(self) -> None:
        """Write the waiting records, if that succeeds at once."""
        done, _ = await asyncio.wait({self._writing}, timeout=STUCK_SECONDS)
        if done and self.num_waiting:
            self._write_soon()
            await asyncio.wait({self._writing}, timeout=STUCK_SECONDS)
        if self.num_waiting:
            logger.error("%d usage records could not be written to %s, and are lost", self.num_waiting, self._file)
        self._batches.put(None)
        self._readers.shutdown(wait=False, cancel_futures=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _write_soon(self) -> None:
        if self._writing.done():
            lines, self._lines = self._lines, []
            self._num_given = self._num_noted
            self._writing = self._loop.create_future()
            self._batches.put(lines)

    def _write_batches(self) -> None:
        """Write batches from the queue until None comes. Runs in a thread of its own."""
        while (lines := self._batches.get()) is not None:
            failure = None
            try:
                self.files.append(lines)
            except OSError as error:
                failure = error.strerror or str(error)
            with suppress(RuntimeError):  # the loop was closed while the disk did not answer
                self._loop.call_soon_threadsafe(self._written_out, failure)
        self.files.close()

    def _written_out(self, failure: str | None) -> None:
        self._writing.set_result(None)
        if failure is None:
            self._say_written()
        else:
            self._say_failing(failure)
        self._tell_if_full()

    def _say_written(self) -> None:
        if self._fails:
            logger.info("usage records can be written to %s again", self._file)
        self._fails = False
        if self._num_written < self._num_given:
            self._num_written = self._num_given
            for grown in self._watchers:
                grown.set()
        if self._lines:
            self._write_soon()

    def _say_failing(self, why: str) -> None:
        if not self._fails:
            logger.error(
                "usage records cannot be written to %s (%s): they wait in memory, and are lost if the service ends "
                "before that is mended. Once %d wait, no generation is begun",
                self._file,
                why,
                self._max_waiting,
            )
        self._fails = True

    def _tell_if_full(self) -> None:
        if self.full is not self._was_full:
            self._was_full = self.full
            self._tell_full(self.full)
