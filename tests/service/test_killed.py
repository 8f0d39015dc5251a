"""SIGKILL at any point of registering, swapping or deleting adapters: afterwards nothing is half there.

The process that dies is a real one, forked by a server that has everything imported.
"""

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest

from adapters.registry import AdapterState
from adapters.source import digest
from tests.service.control_plane import write_adapter
from tests.service.killed_life import Life, live

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.service.killed_life"])


def prepare(directory: Path) -> Path:
    directory.mkdir()
    for seed in range(2):
        write_adapter(directory / f"a{seed}", seed=seed)
    return directory


def die(directory: Path, deadly: int) -> list[tuple[str, Any]]:
    """A life that ends at a point; what it had promised."""
    process = CONTEXT.Process(target=live, args=(directory, deadly))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if deadly else 0), f"point {deadly}: exit code {process.exitcode}"
    return [tuple(json.loads(line)) for line in (directory / "promises").read_text().splitlines()]


def allowed(before: list[Any], after: list[Any]) -> list[list[Any]]:
    """What may be found when one change was under way: all before, all after, or the alias not moved yet."""
    was_current = {name for name, current in before if current}
    unmoved = [[name, name in was_current] for name, _ in after]
    return [before, after, unmoved]


@pytest.fixture(scope="module")
def whole_life(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Any]], int]:
    """The shapes after each change of a life that nobody ends, and the number of its points."""
    *promises, (_, num_points) = die(prepare(tmp_path_factory.mktemp("whole") / "life"), 0)
    return [[], *(shape for _, shape in promises)], num_points


async def check_next_life(directory: Path, shapes: list[list[Any]], num_promises: int) -> None:
    life = Life.begin(directory)
    assert life.shape() in allowed(shapes[num_promises], shapes[min(num_promises + 1, len(shapes) - 1)])
    await life.deployer.reconcile()
    versions = life.registry.list_versions(include_versions=True)
    staying = [version for version in versions if version.state is not AdapterState.DELETING]
    for version in staying:
        assert digest(Path(life.deployer.directory(version))) == version.key.digest
    await life.until(lambda: all(v.state is AdapterState.ACTIVE for v in map(life.version, staying)))
    await life.until(lambda: len(life.registry.list_versions(include_versions=True)) == len(staying))
    await life.state.saved()
    await life.end()
    depot = directory / "state" / "adapters"
    assert list((depot / "incoming").iterdir()) == []
    assert {file.name for file in (depot / "versions").iterdir()} == {v.key.digest for v in staying if not v.directory}


@pytest.mark.parametrize("part", range(4))
async def test_whatever_was_promised_is_there_and_nothing_is_half_there(
    tmp_path: Path, whole_life: tuple[list[list[Any]], int], part: int
) -> None:
    shapes, num_points = whole_life
    assert num_points > 80
    for deadly in range(1 + part, num_points + 1, 4):
        directory = prepare(tmp_path / f"life-{deadly}")
        promises = die(directory, deadly)
        await check_next_life(directory, shapes, len(promises))
