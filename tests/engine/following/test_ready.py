"""The first rank waits for the others as long as they read, and gives up on those that stand still."""

from __future__ import annotations

import pytest

from loraplex_engine.following.ready import READ, SILENT_SECONDS, LoadWatch, loaded_note
from loraplex_engine.ranks.group import Notes, RanksLostError


class Wait:
    """The first rank's wait for two others, by a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.notes = Notes(None, 3)
        self.watch = LoadWatch(self.notes, (1, 2), lambda: self.now)

    def check_after(self, seconds: float) -> None:
        self.now += seconds
        self.watch.check()


def test_ranks_that_read_may_take_as_long_as_they_like() -> None:
    wait = Wait()
    for _ in range(5):
        wait.check_after(0.9 * SILENT_SECONDS)
        wait.notes.add(READ, 1)


def test_a_rank_that_reads_nothing_more_is_named() -> None:
    wait = Wait()
    wait.notes.add(READ, 1)
    wait.check_after(2 * SILENT_SECONDS)
    wait.notes.put(loaded_note(1), b"")
    with pytest.raises(RanksLostError, match="rank 2 has read nothing of the model"):
        wait.check_after(1.1 * SILENT_SECONDS)
