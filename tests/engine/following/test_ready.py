"""The first rank waits for the others, and tells of them as long as they read."""

from __future__ import annotations

from loraplex_engine.following.ready import READ, LoadWatch
from loraplex_engine.ranks.group import Notes


class Told:
    """A `LoadReport` that is kept."""

    def __init__(self) -> None:
        self.waited: list[str] = []

    def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
        raise AssertionError("nothing is read here")

    def waits(self, what: str) -> None:
        self.waited.append(what)


def test_ranks_that_read_are_told_of_each_time() -> None:
    notes, told = Notes(None, 3), Told()
    watch = LoadWatch(notes, told, "rank 2")
    for count in range(1, 6):
        watch.check()
        assert told.waited == ["rank 2"] * count
        notes.add(READ, 1)


def test_ranks_that_stand_still_are_told_of_once() -> None:
    told = Told()
    watch = LoadWatch(Notes(None, 3), told, "rank 2")
    for _ in range(3):
        watch.check()
    assert told.waited == ["rank 2"]
