"""The state file: what was saved is there after a restart, and no two servers write it."""

import sqlite3
from pathlib import Path

import pytest

from loraplex_service.errors import Unavailable
from loraplex_service.state import FILE_NAME, StateFile


async def test_what_was_saved_is_there_in_the_next_life(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.put("adapter", "a", b"1")
    state.put("adapter", "b", b"2")
    state.put("route", "a", b"3")
    await state.saved()
    state.delete("adapter", "a")
    state.put("adapter", "b", b"4")
    await state.close()
    state = StateFile(tmp_path)
    assert (state.read("adapter"), state.read("route")) == ({"b": b"4"}, {"a": b"3"})
    await state.close()


async def test_without_a_directory_nothing_survives() -> None:
    state = StateFile(None)
    state.put("adapter", "a", b"1")
    await state.saved()
    assert state.read("adapter") == {"a": b"1"}
    await state.close()
    state = StateFile(None)
    assert state.read("adapter") == {}
    await state.close()


async def test_a_second_server_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    with pytest.raises(OSError, match="another server is using it"):
        StateFile(tmp_path)
    await state.close()
    await StateFile(tmp_path).close()


async def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, and long enough to be sure of it" * 100)
    with pytest.raises(OSError, match=r"state_directory: .*not a database"):
        StateFile(tmp_path)


async def test_the_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    await StateFile(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(OSError, match=r"a newer version of Loraplex .*: start that one"):
        StateFile(tmp_path)


async def test_a_change_that_cannot_be_written_is_an_error_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFile(tmp_path)
    commit = state._commit

    def fail(changes: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(state, "_commit", fail)
    state.put("adapter", "a", b"1")
    with pytest.raises(Unavailable, match="disk is full"):
        await state.saved()
    monkeypatch.setattr(state, "_commit", commit)
    await state.saved()
    assert state.read("adapter") == {"a": b"1"}
    await state.close()


async def test_it_knows_how_much_it_keeps_for_a_tenant_in_the_next_life_too(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.put("adapter", "acme/a", b"123")
    state.put("route", "tenants/acme/routes/r", b"4567")
    state.put("route", "tenants/other/routes/r", b"x")
    state.put("route", "tenants/acme/routes/gone", b"x")
    state.delete("route", "tenants/acme/routes/gone")
    assert state.size("acme") == 7
    await state.close()
    state = StateFile(tmp_path)
    assert (state.size("acme"), state.size("other"), state.size("nobody")) == (7, 1, 0)
    await state.close()


async def test_what_is_saved_first_and_cannot_be_is_not_there_later_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFile(tmp_path)
    await state.save("adapter", "a", b"1")
    with monkeypatch.context() as full:
        full.setattr(state, "_commit", refuse)
        with pytest.raises(Unavailable, match="not in force") as raised:
            await state.save("adapter", "a", b"2")
        assert raised.value.reason == "STATE_UNWRITABLE"
        state.put("adapter", "b", b"3")
        with pytest.raises(Unavailable):
            await state.saved()
    await state.close()
    state = StateFile(tmp_path)
    assert state.read("adapter") == {"a": b"1", "b": b"3"}
    await state.close()


async def test_what_was_noted_before_is_noted_still_when_what_should_follow_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFile(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(state, "_commit", refuse)
        state.put("adapter", "a", b"1")
        for change in (state.save("adapter", "a", b"2"), state.saved()):
            with pytest.raises(Unavailable):
                await change
    await state.close()
    state = StateFile(tmp_path)
    assert state.read("adapter") == {"a": b"1"}
    await state.close()


def refuse(changes: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


async def test_a_file_that_was_removed_takes_no_changes(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    await state.save("adapter", "a", b"1")
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(Unavailable, match="was removed"):
        await state.save("adapter", "a", b"2")
    await state.close()
