"""The files of an adapter on a machine that follows: the first one offers them while they are loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import zmq

from loraplex_adapters.files.source import FILES
from loraplex_engine.link.machines import (
    MAX_FRAME_BYTES,
    PIECE_BYTES,
    SILENT_SECONDS,
    TO_MACHINE,
    Files,
    ListFiles,
    Meeting,
    Piece,
    ReadFile,
    Refused,
    ToMachine,
    frames_of,
    read_frames,
)

T = TypeVar("T", bound=ToMachine)

# From the number of a load and the directories on the first machine to those on this one, while they are needed.
AdapterFiles = Callable[[int, Sequence[Path]], AbstractContextManager[list[Path]]]


@contextmanager
def files_here(load: int, directories: Sequence[Path]) -> Iterator[list[Path]]:
    """The `AdapterFiles` of the first machine itself."""
    yield list(directories)


class OfferedFiles:
    """What the other machines may read of the first one: adapters, each while it is loaded. Any thread may call it."""

    def __init__(self) -> None:
        self._directories: dict[int, Sequence[Path]] = {}  # of each load that runs, by its number
        self._lock = threading.Lock()

    def offer(self, load: int, directories: Sequence[Path]) -> None:
        """Let the other machines read the adapters in these directories, for a load of this number."""
        with self._lock:
            self._directories[load] = directories

    def withdraw(self, load: int) -> None:
        """Take that back."""
        with self._lock:
            self._directories.pop(load, None)

    def answer(self, question: ListFiles | ReadFile) -> ToMachine:
        """What another machine is told."""
        with self._lock:
            directories = self._directories.get(question.load, ())
        if not 0 <= question.part < len(directories):
            return Refused(f"no adapter of load {question.load} is offered")
        directory = directories[question.part]
        match question:
            case ListFiles():
                return Files([name for name in FILES if (directory / name).is_file()])
            case ReadFile(name=name, start=start) if name in FILES:
                return _piece(directory / name, start)
            case ReadFile(name=name):
                return Refused(f"{name}: no adapter has such a file")


def _piece(file: Path, start: int) -> ToMachine:
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            return Piece(opened.read(PIECE_BYTES))
    except (OSError, ValueError) as error:
        return Refused(f"{file.name}: cannot be read: {error}")


class FetchedFiles:
    """The `AdapterFiles` of a machine that shares no file with the first one. Any thread may call it."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    @contextmanager
    def __call__(self, load: int, directories: Sequence[Path]) -> Iterator[list[Path]]:
        """Raises OSError where they cannot be read, or the first machine does not answer."""
        with TemporaryDirectory(prefix="loraplex-adapter-") as folder, self._connected() as connection:
            found = []
            for part, directory in enumerate(directories):
                here = Path(folder) / f"{part}-{directory.name}"
                here.mkdir()
                for name in _asked(connection, ListFiles(load, part), Files).names:
                    if name in FILES:
                        _fetch(connection, load, part, here / name)
                found.append(here)
            yield found

    @contextmanager
    def _connected(self) -> Iterator[zmq.Socket[bytes]]:
        with zmq.Context(io_threads=1) as context, context.socket(zmq.DEALER) as connection:
            self._meeting.keys.join(connection)
            connection.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            connection.setsockopt(zmq.LINGER, 0)
            connection.connect(self._meeting.endpoint)
            yield connection


def _fetch(connection: zmq.Socket[bytes], load: int, part: int, file: Path) -> None:
    with file.open("wb") as opened:
        while data := _asked(connection, ReadFile(load, part, file.name, opened.tell()), Piece).data:
            opened.write(data)


def _asked(connection: zmq.Socket[bytes], question: ListFiles | ReadFile, kind: type[T]) -> T:
    """The first machine's answer. Raises OSError."""
    connection.send_multipart(frames_of(question))
    if not connection.poll(round(1000 * SILENT_SECONDS)):
        raise OSError(f"the first machine has not answered for {SILENT_SECONDS:g} s")
    try:
        answer = read_frames(connection.recv_multipart(), TO_MACHINE)
    except ValueError as error:
        raise OSError(f"the first machine's answer cannot be read: {error}") from error
    if isinstance(answer, Refused):
        raise OSError(answer.problem)
    if not isinstance(answer, kind):
        raise OSError(f"the first machine answered with {type(answer).__name__}, not {kind.__name__}")
    return answer
