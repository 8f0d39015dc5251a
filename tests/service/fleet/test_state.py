"""The state of one replica beside a database that hangs, goes back in time, or holds what it cannot read."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from loraplex_service.errors import Unavailable
from loraplex_service.fleet import state as module
from loraplex_service.fleet.database import Cursor, Database, DatabaseAway
from loraplex_service.fleet.state import FleetState
from loraplex_service.state import StateFile
from tests.service.fleet.conftest import TestDatabase
from tests.service.fleet.test_replicas import until
from tests.waits import MOST_SECONDS

KIND = "note"
NEWER = b"of a newer version"


class Known(dict[str, bytes]):
    """What a replica was told; it cannot read what is of a newer version."""

    def follow(self, name: str, body: bytes | None) -> None:
        if body is None:
            self.pop(name, None)
        elif body == NEWER:
            raise ValueError("it is of a newer version")
        else:
            self[name] = body


@asynccontextmanager
async def replica(database: TestDatabase, known: Known, name: str) -> AsyncIterator[FleetState]:
    state = FleetState(StateFile(None), lambda listens: Database(database.dsn, name, listens))
    state.follow(KIND, known.follow)
    await state.start()
    try:
        yield state
    finally:
        await state.close()


async def save(state: FleetState, name: str, body: bytes | None) -> None:
    await state.change(lambda: state.save(KIND, name, body))


async def test_nobody_changes_what_they_cannot_read(database: TestDatabase) -> None:
    old, new = Known(), Known()
    new.follow = new.__setitem__  # type: ignore[method-assign,assignment]
    async with replica(database, old, "old") as one, replica(database, new, "new") as two:
        await save(one, "a", b"1")
        await save(two, "a", NEWER)
        await until(lambda: one.figures.passed_over == 1)
        with pytest.raises(Unavailable, match="cannot read"):
            await save(one, "a", b"2")
        await save(one, "b", b"2")
        await save(two, "a", b"3")
        await until(lambda: old.get("a") == b"3")
        await save(one, "a", b"4")
        await until(lambda: new["a"] == b"4")


async def test_changes_that_the_database_has_lost_are_undone(database: TestDatabase) -> None:
    known, other = Known(), Known()
    async with replica(database, known, "one") as one, replica(database, other, "two") as two:
        await save(one, "kept", b"1")
        await until(lambda: other.get("kept") == b"1")
        kept = Cursor(*database.ask("SELECT last, mark FROM loraplex_head")[0])
        await save(one, "lost", b"2")
        await until(lambda: other.get("lost") == b"2")
        database.go_back(*kept)
        await save(two, "new", b"3")
        await until(lambda: known == {"kept": b"1", "new": b"3"})
        await until(lambda: "lost" not in other)


class Hanging:
    """A connection whose work hangs, and so does what it does next."""

    def __init__(self, listens: bool) -> None:
        self._ended = threading.Semaphore(0)
        self.times_ended = 0

    def news(self, *asked: Any) -> Any:
        assert self._ended.acquire(timeout=MOST_SECONDS)
        assert self._ended.acquire(timeout=MOST_SECONDS)
        raise DatabaseAway("it hangs")

    def abandon(self) -> None:
        self.times_ended += 1
        self._ended.release()

    def close(self) -> None:
        pass


async def test_a_connection_that_hangs_again_is_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.01)
    state = FleetState(StateFile(None), Hanging)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="it hangs"):
        await state.start()
    await state.close()
