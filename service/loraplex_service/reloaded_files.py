"""Files that may change while the server runs."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ReloadedFiles(Generic[T]):
    """The content of some files, read again when one of them has changed.

    If the changed files cannot be read, that is logged and the earlier content stays in force: half-written files do
    not lock callers out. For any thread.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], T]) -> None:
        """Read the files. Raises what `read` raises."""
        self._paths = [Path(path) for path in paths]
        self._read = read
        self._lock = threading.Lock()
        self._state = self._look()
        self._content = read()

    def get(self) -> T:
        """The present content."""
        with self._lock:
            state = self._look()
            if state != self._state:
                self._state = state
                names = ", ".join(map(str, self._paths))
                try:
                    self._content = self._read()
                except (OSError, ValueError) as error:
                    logger.error("%s changed and cannot be used; the earlier content stays in force: %s", names, error)
                else:
                    logger.info("%s changed and was read again", names)
            return self._content

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state(path) for path in self._paths]


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
