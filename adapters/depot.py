"""Adapters whose files the server keeps itself: those that were uploaded to it, or fetched from elsewhere.

One directory for each digest, which is whole or not there at all: files are gathered under another name and moved in
at one moment, and moved out again before they are removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path


class Depot:
    """A directory of adapter directories by digest. Methods that say so take as long as the disk does."""

    def __init__(self, root: Path) -> None:
        """Raises OSError for a directory that cannot be made."""
        self._versions = root / "versions"
        self._incoming = root / "incoming"
        self._make_directories()

    def path(self, digest: str) -> Path:
        """Where the files of this digest are, or would be."""
        return self._versions / digest

    def begin(self) -> Path:
        """A new empty directory, to gather files in."""
        self._make_directories()
        return Path(tempfile.mkdtemp(dir=self._incoming))

    def settle(self, incoming: Path) -> None:
        """Have the gathered files on the disk. Slow."""
        for file in incoming.iterdir():
            _sync(file)
        _sync(incoming)

    def admit(self, incoming: Path, digest: str) -> Path:
        """Move settled files in. If the digest is there already, that stays; `discard` what was gathered either way."""
        final = self.path(digest)
        if not final.exists():
            incoming.rename(final)
            _sync(self._versions)
        return final

    def discard(self, incoming: Path) -> None:
        """Forget what was gathered. Slow. A directory that was admitted or discarded already is not an error."""
        shutil.rmtree(incoming, ignore_errors=True)

    def withdraw(self, digest: str) -> Path | None:
        """Move a digest's files out, for `discard`. None: they are not there."""
        target = self.begin()
        try:
            self.path(digest).rename(target)
        except FileNotFoundError:
            target.rmdir()
            return None
        return target

    def sweep(self, keep: Collection[str] | None) -> None:
        """Remove everything but these digests: what an earlier life had begun, or had not finished removing. Slow.

        `keep`: None for all of them.
        """
        for directory in self._incoming.iterdir():
            self.discard(directory)
        for directory in list(self._versions.iterdir()):
            if (
                keep is not None
                and directory.name not in keep
                and (withdrawn := self.withdraw(directory.name)) is not None
            ):
                self.discard(withdrawn)

    def _make_directories(self) -> None:
        """Again, where a cleaner has removed them."""
        for directory in (self._versions, self._incoming):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
