"""SIGKILL at any point of registering, swapping, pinning, deleting and routing: afterwards nothing is half there.

The process that dies is a real one, forked by a server that has everything imported. LORAPLEX_KILLED_LIVES: how many
scripts of random calls are tried beside the one that has them all.
"""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loraplex_adapters.files.source import digest
from loraplex_adapters.versions import AdapterState
from loraplex_service.errors import NotFound
from tests.service.control_plane import write_adapter
from tests.service.killed_life import CONTENTS, EVERYTHING, Call, Life, Shape, any_script, live

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.service.killed_life"])
NUM_SCRIPTS = int(os.environ.get("LORAPLEX_KILLED_LIVES", "3"))
DEATHS_OF_SCRIPT = 5  # of a random one; every other life that follows one dies as well


def prepare(directory: Path) -> Path:
    directory.mkdir()
    for seed in CONTENTS:
        write_adapter(directory / f"a{seed}", seed=seed)
    return directory


def run(directory: Path, script: Sequence[Call], deadly: int) -> list[Any]:
    """A life that ends at a point, if it gets there; what it had promised, and the number of its points if not."""
    process = CONTEXT.Process(target=live, args=(directory, script, deadly))
    process.start()
    process.join(60)
    assert process.exitcode in ((0, -signal.SIGKILL) if deadly else (0,)), f"point {deadly}: {process.exitcode}"
    return [json.loads(line) for line in (directory / "promises").read_text().splitlines()]


def run_whole(directory: Path, script: Sequence[Call]) -> tuple[list[Shape], int]:
    """What is there after each call of a life that nobody ends, and the number of its points."""
    *shapes, num_points = run(prepare(directory), script, 0)
    assert len(shapes) == len(script)
    return [[], *shapes], num_points


def allowed(before: Shape, after: Shape) -> list[Shape]:
    """What may be found when one call was under way: all before, all after, or the alias not moved yet to what came."""
    was_current = {name: current for name, current, *_ in before}
    if all(name in was_current for name, *_ in after):
        return [before, after]
    unmoved = [
        [name, was_current.get(name, False), *more] if "@" in name else [name, current, *more]
        for name, current, *more in after
    ]
    return [before, after, unmoved]


async def check_next_life(directory: Path, shapes: list[Shape], num_promises: int) -> None:
    life = Life.begin(directory)
    found = life.shape()
    assert found in allowed(shapes[num_promises], shapes[min(num_promises + 1, len(shapes) - 1)])
    await life.start()
    await life.until(lambda: life.work.is_done)
    versions, staying = life.registry.list_versions(include_versions=True), life.staying()
    assert versions == staying
    for version in staying:
        assert version.state is AdapterState.ACTIVE
        assert digest(Path(life.library.directory(version))) == version.key.digest
    assert life.engine.pinned == {version.key for version in staying if version.spec.pinned}
    check_routes(life)
    settled = life.shape()
    await life.state.saved()
    await life.end()
    depot = directory / "state" / "adapters"
    assert list((depot / "incoming").iterdir()) == []
    assert {file.name for file in (depot / "versions").iterdir()} == {v.key.digest for v in staying if not v.directory}
    life = Life.begin(directory)
    assert life.shape() == settled
    await life.end()


def check_routes(life: Life) -> None:
    """What they lead to is there, all of a sum, or is said not to be there."""
    names = {version.spec.base_model for version in life.staying()} | {"tiny"}
    names |= {version.name.rpartition("/")[2] for version in life.staying()}
    for route in life.book.all():
        for target in [*(target.model for target in route.targets), *filter(None, [route.fallback])]:
            members = [term.partition("*")[0].strip() for term in target.split("+")]
            try:
                found = life.catalog.target("shared", target, "model")
            except NotFound:
                assert not names.issuperset(members)
            else:
                assert names.issuperset(members)
                assert len(found.versions) == len(set(members) - {"tiny"})
                assert all(version.state is AdapterState.ACTIVE for version in found.versions)


@pytest.fixture(scope="module")
def whole_life(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Shape], int]:
    return run_whole(tmp_path_factory.mktemp("whole") / "life", EVERYTHING)


def test_a_whole_life_does_everything_that_it_is_told(whole_life: tuple[list[Shape], int]) -> None:
    shapes, num_points = whole_life
    assert num_points > 110
    assert all(before != after for before, after in pairwise(shapes))


@pytest.mark.parametrize("part", range(4))
async def test_whatever_was_promised_is_there_and_nothing_is_half_there(
    tmp_path: Path, whole_life: tuple[list[Shape], int], part: int
) -> None:
    shapes, num_points = whole_life
    for deadly in range(1 + part, num_points + 1, 4):
        directory = prepare(tmp_path / f"life-{deadly}")
        promises = run(directory, EVERYTHING, deadly)
        await check_next_life(directory, shapes, len(promises))


@pytest.mark.parametrize("seed", range(NUM_SCRIPTS))
async def test_any_calls_may_be_under_way_when_one_life_ends_and_the_next_begins(tmp_path: Path, seed: int) -> None:
    script = any_script(seed)
    shapes, num_points = run_whole(tmp_path / "whole", script)
    draw = random.Random(seed)
    for deadly in draw.sample(range(1, num_points + 1), DEATHS_OF_SCRIPT):
        directory = prepare(tmp_path / f"life-{deadly}")
        num_promises = len(run(directory, script, deadly))
        if deadly % 2:
            run(directory, [], draw.randrange(1, 20))
        await check_next_life(directory, shapes, num_promises)
