"""What a server's own state and the state of a fleet have in common."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loraplex_service.errors import Unavailable
from loraplex_service.fleet.database import Database
from loraplex_service.fleet.state import FleetState
from loraplex_service.state import State, StateFile
from tests.service.fleet.conftest import TestDatabase


@pytest.fixture(params=["file", "database"])
def life(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], object]:
    """Begins one life after another on the same state."""
    database: TestDatabase | None = request.getfixturevalue("database") if request.param == "database" else None

    @asynccontextmanager
    async def life() -> AsyncIterator[State]:
        state: State = StateFile(tmp_path)
        if database is not None:
            dsn = database.dsn
            state = FleetState(state, lambda listens: Database(dsn, "test", listens))  # type: ignore[arg-type]
            state.follow("adapter", lambda name, body: None)
        await state.start()
        try:
            yield state
        finally:
            await state.close()

    return life


async def save(state: State, name: str, body: bytes | None) -> None:
    await state.change(lambda: state.save("adapter", name, body))


async def test_what_was_saved_is_there_in_the_next_life(life) -> None:
    async with life() as state:
        await save(state, "a", b"1")
        await save(state, "b", b"2")
        await save(state, "b", b"3")
        await save(state, "a", None)
    async with life() as state:
        assert state.read("adapter") == {"b": b"3"}


async def test_what_was_noted_is_there_in_the_next_life(life) -> None:
    async with life() as state:
        await save(state, "a", b"1")
        state.put("adapter", "a", b"2")
        await state.saved()
    async with life() as state:
        assert state.read("adapter") == {"a": b"2"}


async def test_it_knows_how_much_it_keeps_for_a_tenant_in_the_next_life_too(life) -> None:
    async with life() as state:
        await save(state, "acme/a", b"123")
        await save(state, "other/a", b"1")
        assert (state.size("acme"), state.size("other"), state.size("nobody")) == (3, 1, 0)
    async with life() as state:
        assert (state.size("acme"), state.size("other")) == (3, 1)


async def test_changes_run_one_after_the_other_even_if_their_caller_goes_away(life) -> None:
    async with life() as state:
        order: list[str] = []

        async def change(name: str) -> None:
            order.append(f"begin {name}")
            await state.save("adapter", name, b"1")
            order.append(f"end {name}")

        first = asyncio.create_task(state.change(lambda: change("a")))
        await asyncio.sleep(0)
        first.cancel()
        await state.change(lambda: change("b"))
        assert order == ["begin a", "end a", "begin b", "end b"]


async def test_what_a_change_objects_to_is_not_saved(life) -> None:
    async with life() as state:

        async def object_to_it() -> None:
            raise Unavailable("OVERLOADED", "not now")

        with pytest.raises(Unavailable, match="not now"):
            await state.change(object_to_it)
    async with life() as state:
        assert state.read("adapter") == {}
