"""The server's own copies of adapter files that were uploaded, or fetched from remote sources.

Each digest has one directory, which is whole or absent: files are gathered under another name and moved in atomically,
and moved out again before they are removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path


class Depot:
    """A directory of adapter directories by digest. Methods marked slow take as long as the disk does."""

    def __init__(self, root: Path) -> None:
        """Make the directory. Raises OSError."""
        self._versions = root / "versions"
        self._incoming = root / "incoming"
        self._make_directories()
        self._of_before = [*self._incoming.iterdir(), *self._versions.iterdir()]  # of an earlier process

    def path(self, digest: str) -> Path:
        """The directory for files of this digest, whether it exists or not."""
        return self._versions / digest

    def begin(self) -> Path:
        """Make a new empty directory, to gather files in."""
        self._make_directories()
        return Path(tempfile.mkdtemp(dir=self._incoming))

    def settle(self, incoming: Path) -> None:
        """Flush the gathered files to the disk. Slow."""
        for file in incoming.iterdir():
            _sync(file)
        _sync(incoming)

    def admit(self, incoming: Path, digest: str) -> Path:
        """Move settled files in. An existing copy of the digest stays. Call `discard` on the directory either way."""
        final = self.path(digest)
        if not final.exists():
            incoming.rename(final)
            _sync(self._versions)
        return final

    def discard(self, incoming: Path) -> None:
        """Remove a directory of gathered files. Slow. One that was admitted or discarded already is not an error."""
        shutil.rmtree(incoming, ignore_errors=True)

    def withdraw(self, digest: str) -> Path | None:
        """Move a digest's files out, to a directory for `discard`; None: there are none."""
        target = self.begin()
        try:
            self.path(digest).rename(target)
        except FileNotFoundError:
            target.rmdir()
            return None
        return target

    def sweep(self, keep: Collection[str] | None) -> None:
        """Remove what an earlier process left, but for these digests. What has begun since stays. Slow.

        `keep`: None: all digests.
        """
        for directory in self._of_before:
            if directory.parent == self._incoming:
                self.discard(directory)
            elif keep is not None and directory.name not in keep:
                withdrawn = self.withdraw(directory.name)
                if withdrawn is not None:
                    self.discard(withdrawn)

    def _make_directories(self) -> None:
        """Make the directories, again if a cleaner has removed them."""
        for directory in (self._versions, self._incoming):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
