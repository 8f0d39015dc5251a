"""The directory of a service's bus addresses: for its owner alone, made again if it is removed, never left behind.

Its service holds a lock on it, which ends with the process, however that ends. So the next service finds what a killed
one has left, and takes nothing from one that lives. Cleaners of /tmp that know such locks, as systemd's does, pass it
over. Torch-free.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PREFIX: Final = "loraplex-bus-"
ATTEMPTS: Final = 10  # to make one that no other service has taken for abandoned, in the moment before it is locked


class BusDirectory:
    """A new one, mode 0700. Short: a socket path has 107 bytes. `with` removes it at the end."""

    def __init__(self) -> None:
        """Removes what killed services of this user have left, too. Raises OSError."""
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path, self._lock = _make()

    def ensure(self) -> None:
        """Make it again if it is gone. Raises OSError, also where somebody else has taken its name."""
        if not _is_locked_by(self._lock, self.path):
            self.path.mkdir(mode=0o700, exist_ok=True)
            lost, self._lock = self._lock, _lock(self.path)
            os.close(lost)
            os.fchmod(self._lock, 0o700)  # which the owner alone may do

    def close(self) -> None:
        """Remove it with all that is in it."""
        if _is_locked_by(self._lock, self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _make() -> tuple[Path, int]:
    for _ in range(ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(path)
            if _is_locked_by(lock, path):
                return path, lock
            os.close(lock)
    raise OSError(f"no directory in {tempfile.gettempdir()} stays: something removes each as soon as it is made")


def _lock(path: Path) -> int:
    """Raises BlockingIOError if it is locked, other OSErrors if it is no directory or cannot be entered."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_locked_by(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.lstat())
    except FileNotFoundError:
        return False


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is locked, another user's, or gone by now
            lock = _lock(path)
            if os.fstat(lock).st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
