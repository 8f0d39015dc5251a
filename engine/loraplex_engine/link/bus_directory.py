"""The directory of a service's bus addresses: for its owner alone, made again if it is removed, never left behind.

The service holds a lock on the directory, which ends with the process, however that ends. So the next service can
remove what killed services have left, and nothing of a running one. Cleaners of /tmp that respect such locks, as
systemd's does, pass it over. Torch-free.
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
    """A new directory, mode 0700, with a short name: a socket path has 107 bytes. The end of a `with` removes it."""

    def __init__(self) -> None:
        """Make the directory, and remove those of this user's killed services. Raises OSError."""
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path, self._lock = _make()

    def ensure(self) -> None:
        """Make the directory again if it is gone. Raises OSError, also if another user has taken its name."""
        if not _is_locked_by(self._lock, self.path):
            self.path.mkdir(mode=0o700, exist_ok=True)
            lost, self._lock = self._lock, _lock(self.path)
            os.close(lost)
            os.fchmod(self._lock, 0o700)  # which the owner alone may do

    def close(self) -> None:
        """Remove the directory with all that is in it."""
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
    """Lock a directory.

    Raises BlockingIOError if it is locked, other OSErrors if it is no directory or not accessible.
    """
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
