"""What a rank says of itself while it loads its share, and when it has."""

import time
from collections.abc import Callable, Collection
from typing import Final

import msgspec

from loraplex_engine.ranks.group import Notes, RanksLostError

READ: Final = "read"  # the note that counts what all ranks that follow have read, tensor by tensor
SILENT_SECONDS: Final = 600.0  # much more than one tensor takes, or the start of a process


class RankReady(msgspec.Struct, frozen=True):
    """The end of a rank's load."""

    problem: str = ""  # why it could not; "": it could
    weight_bytes: int = 0
    free_bytes: int = 0  # of its device


def loaded_note(rank: int) -> str:
    """The name of the note with it."""
    return f"loaded/{rank}"


class LoadWatch:
    """Notes when ranks that load read nothing more: one that stands still has not ended, and would be waited for."""

    def __init__(self, notes: Notes, ranks: Collection[int], clock: Callable[[], float] = time.monotonic) -> None:
        """`ranks`: those that are waited for."""
        self._notes = notes
        self._ranks = ranks
        self._clock = clock
        self._read = notes.add(READ, 0)
        self._since = clock()

    def check(self) -> None:
        """Raise RanksLostError if they have read nothing for SILENT_SECONDS."""
        read, now = self._notes.add(READ, 0), self._clock()
        if read != self._read:
            self._read, self._since = read, now
        elif now - self._since > SILENT_SECONDS:
            missing = [str(rank) for rank in self._ranks if not self._notes.has(loaded_note(rank))]
            raise RanksLostError(
                f"rank {', '.join(missing)} has read nothing of the model for {SILENT_SECONDS:g} s: see whether its "
                "process stands still, or the file system that the model is on"
            )
