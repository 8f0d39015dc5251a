"""Blocks on disk: read back whole or not at all, within their budget, by the engine that may."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraplex_engine.execution.disk_cache import DiskCache

BLOCK = 100
FILE = BLOCK + 32


class AtOnce(Executor):
    """Does what it is given in the thread that gives it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        fn(*args, **kwargs)
        return Future()


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, BLOCK, dtype=np.uint8)


class Bench:
    """A disk cache of a few blocks, below slots that the test fills and reads."""

    def __init__(self, directory: Path, num_files: int = 4, identity: bytes = b"model") -> None:
        self.slots = np.zeros((8, BLOCK), dtype=np.uint8)
        self.directory = directory
        self.disk = DiskCache(directory, num_files * FILE + 5, identity, self.slots, executor=lambda name: AtOnce())

    def write(self, *numbers: int) -> None:
        for number in numbers:
            self.slots[0] = content(number)
            self.disk.write(bytes([number]), 0)
            assert not [done.problem for done in self.disk.finished() if done.problem]

    def read(self, number: int) -> bool:
        """Whether a block is found, and is what was written."""
        if bytes([number]) not in self.disk:
            return False
        self.disk.read(bytes([number]), 1)
        [done] = self.disk.finished()
        if not done.problem:
            assert (self.slots[1] == content(number)).all()
        return not done.problem

    def files(self) -> list[Path]:
        return sorted(file for file in self.directory.iterdir() if len(file.name) > 60)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_blocks_outlive_the_engine(directory: Path) -> None:
    first = Bench(directory)
    first.write(1, 2)
    first.disk.close()
    second = Bench(directory)
    assert (second.read(1), second.read(2), second.read(3)) == (True, True, False)
    assert second.disk.num_read == 2


@pytest.mark.parametrize("identity", [b"another model", b""])
def test_another_model_finds_nothing(directory: Path, identity: bytes) -> None:
    first = Bench(directory)
    first.write(1)
    first.disk.close()
    assert not Bench(directory, identity=identity).read(1)


def test_files_of_another_directory_are_not_used(directory: Path, tmp_path: Path) -> None:
    mine, theirs = Bench(directory), Bench(tmp_path / "theirs")
    mine.write(1)
    theirs.write(1)
    shutil.copy(theirs.files()[0], mine.files()[0])
    assert not mine.read(1)


def damage_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)


def name_another(file: Path) -> None:
    others = [each for each in file.parent.iterdir() if len(each.name) > 60 and each != file]
    shutil.copy(others[0], file)


def replace_by_a_link(file: Path) -> None:
    copy = file.with_name("copy")
    file.rename(copy)
    file.symlink_to(copy)


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "harm",
    [
        damage_a_bit,
        name_another,
        replace_by_a_link,
        replace_by_a_pipe,
        Path.unlink,
        lambda file: os.truncate(file, FILE - 1),
        lambda file: os.truncate(file, 0),
        lambda file: os.truncate(file, 1 << 40),  # sparse: reading it whole would not end
    ],
)
def test_a_file_that_is_not_what_was_written_is_a_miss_that_is_counted_and_gone(
    directory: Path, harm: Callable[[Path], object]
) -> None:
    bench = Bench(directory)
    bench.write(1)
    [file] = bench.files()
    bench.write(2)
    harm(file)
    assert not bench.read(1)
    assert bench.disk.num_bad == 1
    assert bytes([1]) not in bench.disk
    assert not os.path.lexists(file)
    assert bench.read(2)


def test_bad_files_are_logged_once(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(directory)
    bench.write(1, 2)
    for file in bench.files():
        damage_a_bit(file)
    with caplog.at_level(logging.WARNING):
        bench.read(1)
        bench.read(2)
    assert [record.getMessage().count("was damaged") for record in caplog.records] == [1]


def test_the_least_recently_used_leaves_and_the_budget_holds(directory: Path) -> None:
    bench = Bench(directory, num_files=3)
    for number in range(3):
        bench.write(number)
    assert bench.read(0)
    bench.write(3, 4)
    assert [bench.read(number) for number in range(5)] == [True, False, False, True, True]
    assert sum(file.stat().st_size for file in bench.files()) == bench.disk.used_bytes == 3 * FILE


def test_a_smaller_budget_is_kept_from_the_start(directory: Path) -> None:
    first = Bench(directory)
    first.write(1, 2, 3, 4)
    first.disk.close()
    assert len(Bench(directory, num_files=2).files()) == 2


def test_what_a_killed_engine_left_half_written_is_removed(directory: Path) -> None:
    first = Bench(directory)
    first.write(1)
    first.disk.close()
    (directory / f"{'a' * 64}.unfinished").write_bytes(b"half")
    (directory / ("b" * 64)).write_bytes(b"cut")
    (directory / "notes.txt").write_text("somebody's own")
    bench = Bench(directory)
    assert bench.read(1)
    assert len(bench.files()) == 1
    assert (directory / "notes.txt").exists()


def test_a_block_that_was_distrusted_is_gone(directory: Path) -> None:
    bench = Bench(directory)
    bench.write(1)
    bench.disk.forget(bytes([1]))
    assert not bench.read(1)
    assert bench.files() == []


def test_a_full_disk_is_a_miss(directory: Path) -> None:
    bench = Bench(directory)
    directory.rename(directory.with_name("gone"))
    bench.disk.write(bytes([1]), 0)
    [done] = bench.disk.finished()
    assert "cannot be written" in done.problem
    assert not bench.read(1)
    assert bench.disk.used_bytes == 0


def test_what_could_not_be_written_to_its_end_leaves_nothing(directory: Path) -> None:
    bench = Bench(directory)
    kept, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE - 1, limit))
    try:
        bench.disk.write(bytes([1]), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kept, limit))
    [done] = bench.disk.finished()
    assert "File too large" in done.problem
    assert {file.name for file in directory.iterdir()} == {"key", "lock"}


@pytest.mark.parametrize("lay", [os.mkfifo, lambda path: os.link(path.parent / "notes", path)])
def test_nothing_is_written_into_what_lies_at_the_place(directory: Path, lay: Callable[[Path], None]) -> None:
    bench = Bench(directory)
    bench.write(1)
    [file] = bench.files()
    bench.disk.forget(bytes([1]))
    (directory / "notes").write_text("somebody's own")
    lay(directory / f"{file.name}.unfinished")
    bench.disk.write(bytes([1]), 0)
    [done] = bench.disk.finished()
    assert "File exists" in done.problem
    assert (directory / "notes").read_text() == "somebody's own"
    bench.write(1)
    assert bench.read(1), "the next attempt finds the place free"


def test_the_directory_is_the_server_s_alone(directory: Path) -> None:
    assert Bench(directory).directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)
    with pytest.raises(ValueError, match=r"no one else may enter: chmod 700 it"):
        Bench(directory)


def test_two_engines_never_share_a_directory(directory: Path) -> None:
    bench = Bench(directory)
    with pytest.raises(ValueError, match=r"used by another engine: name one for each"):
        Bench(directory)
    bench.disk.close()
    Bench(directory)


def test_a_directory_that_is_a_link_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"must be a directory"):
        Bench(directory)


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
def test_a_damaged_key_makes_the_files_useless(directory: Path, key: bytes) -> None:
    first = Bench(directory)
    first.write(1)
    first.disk.close()
    (directory / "key").write_bytes(key)
    assert not Bench(directory).read(1)
