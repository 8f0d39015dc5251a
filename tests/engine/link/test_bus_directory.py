"""The directory of the bus: private, made again where it is removed, and never left behind."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_engine.link.bus_directory import PREFIX, BusDirectory

HOLDS_ONE = """
import time
from loraplex_engine.link.bus_directory import BusDirectory
directory = BusDirectory()
print(directory.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where such directories are made."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another service, and its directory."""
    with subprocess.Popen([sys.executable, "-c", HOLDS_ONE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_only_the_owner_may_enter_it() -> None:
    with BusDirectory() as directory:
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_nothing_is_left_at_the_end(folder: Path) -> None:
    with BusDirectory() as directory:
        (directory.path / "engine").touch()
    assert not list(folder.iterdir())


def test_the_one_of_a_service_that_lives_stays(other: tuple[subprocess.Popen[str], Path]) -> None:
    with BusDirectory():
        assert other[1].is_dir()


def test_the_one_of_a_killed_service_goes_at_the_next_start(other: tuple[subprocess.Popen[str], Path]) -> None:
    process, left = other
    (left / "engine").touch()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.is_dir()
    with BusDirectory():
        assert not left.exists()


def test_what_is_not_such_a_directory_is_passed_over(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / f"{PREFIX}file").touch()
    (folder / f"{PREFIX}link").symlink_to(elsewhere)
    with BusDirectory():
        assert (folder / f"{PREFIX}file").exists()
        assert elsewhere.exists()


def test_one_that_was_removed_is_made_again_and_kept() -> None:
    with BusDirectory() as directory:
        shutil.rmtree(directory.path)
        directory.ensure()
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        with BusDirectory():
            assert directory.path.is_dir()


def test_one_that_is_there_stays_as_it_is() -> None:
    with BusDirectory() as directory:
        (directory.path / "engine").touch()
        directory.ensure()
        assert (directory.path / "engine").exists()


def test_a_link_in_its_place_is_not_followed(folder: Path) -> None:
    (folder / "theirs").mkdir()
    with BusDirectory() as directory:
        os.rmdir(directory.path)
        directory.path.symlink_to(folder / "theirs")
        with pytest.raises(OSError, match=directory.path.name):
            directory.ensure()
    assert (folder / "theirs").is_dir()
