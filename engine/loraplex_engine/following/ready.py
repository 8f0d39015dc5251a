"""What a rank says of itself while it loads its share, and when it has."""

from typing import Final

import msgspec

from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.ranks.group import Notes

READ: Final = "read"  # the note that counts what all ranks that follow have read, tensor by tensor


class RankReady(msgspec.Struct, frozen=True):
    """The end of a rank's load."""

    problem: str = ""  # why it could not; "": it could
    weight_bytes: int = 0
    free_bytes: int = 0  # of its device


def loaded_note(rank: int) -> str:
    """The name of the note with it."""
    return f"loaded/{rank}"


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
