"""SIGKILL at the statements of changes: afterwards a change is in force at all replicas, or at none."""

import json
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.service.fleet.conftest import TestDatabase
from tests.service.fleet.killed_replica import Statements, joining, live
from tests.service.killed_life import Call, Life
from tests.service.test_killed import allowed, prepare

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.service.fleet.killed_replica"])
SCRIPT: list[Call] = [
    ("upload", ["pirate", 0]),
    ("upload", ["pirate", 1]),
    ("use", ["pirate", 0]),
    ("route", ["main", ["pirate"], "tiny"]),
    ("pin", ["pirate", 1, True]),
    ("delete", ["pirate", 1]),
    ("drop_route", ["main"]),
    ("delete", ["pirate", None]),
]
EACH = 6  # of these statements, in one test


def run(directory: Path, dsn: str, script: Sequence[Call], deadly: int) -> list[Any]:
    process = CONTEXT.Process(target=live, args=(directory, dsn, script, deadly))
    process.start()
    process.join(60)
    assert process.exitcode in ((0, -signal.SIGKILL) if deadly else (0,)), f"statement {deadly}: {process.exitcode}"
    return [json.loads(line) for line in (directory / "promises").read_text().splitlines()]


@pytest.mark.long
async def test_a_change_is_in_force_at_all_replicas_or_at_none(
    make_database: Callable[[], TestDatabase], tmp_path: Path
) -> None:
    *shapes, num_statements = run(prepare(tmp_path / "whole"), make_database().dsn, SCRIPT, 0)
    shapes = [[], *shapes]
    assert num_statements > 5 * len(SCRIPT)
    for deadly in range(1, num_statements + 1, EACH):
        database, directory = make_database(), prepare(tmp_path / f"life-{deadly}")
        num_promises = len(run(directory, database.dsn, SCRIPT, deadly))
        found = await next_life(directory, database)
        assert found in allowed(shapes[num_promises], shapes[min(num_promises + 1, len(shapes) - 1)])
        other = await next_life(prepare(tmp_path / f"other-{deadly}"), database)
        assert [name for name, *_ in other] == [name for name, *_ in found]


async def next_life(directory: Path, database: TestDatabase) -> list[Any]:
    life = Life.begin(directory, joining(database.dsn, Statements(0)))
    await life.start()
    await life.until(lambda: life.work.is_done)
    found = life.shape()
    await life.end()
    return found
