"""What a rank says of itself while it loads its share, and when it has."""

import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec

from loraplex_adapters.files.gguf import parts_of
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.ranks.group import Notes

READ: Final = "read"  # the note that counts what all ranks that follow have read, tensor by tensor
END_BYTES: Final = 1 << 16  # of a file of weights, by which it is told from another of its size


class RankReady(msgspec.Struct, frozen=True):
    """The end of a rank's load."""

    problem: str = ""  # why it could not; "": it could
    weight_bytes: int = 0
    free_bytes: int = 0  # of its device
    files: str = ""  # the digest of those that it has read


def loaded_note(rank: int) -> str:
    """The name of the note with it."""
    return f"loaded/{rank}"


def files_digest(path: Path) -> str:
    """A digest by which the model in `path` is told from others: over the sizes and ends of its weights' files,
    and over its configuration. Raises OSError.

    The weights as a whole are not digested: that would read every byte of them once more.
    """
    files = parts_of(path) if path.is_file() else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - END_BYTES))
            digest.update(f"{size}\n".encode() + opened.read())
    return digest.hexdigest()


class LoadWatch:
    """Reports each time that the ranks that follow have read more: one that stands still has not ended."""

    def __init__(self, notes: Notes, report: LoadReport, awaited: str) -> None:
        """`awaited`: what is waited for."""
        self._notes = notes
        self._report = report
        self._awaited = awaited
        self._read = -1

    def check(self) -> None:
        """Look once more. Reports the first time, too."""
        read = self._notes.add(READ, 0)
        if read != self._read:
            self._read = read
            self._report.waits(self._awaited)
