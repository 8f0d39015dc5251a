"""A machine that follows runs the ranks of the engine that there is, and says once what keeps it from that."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from loraplex_engine.following import machine, other_machines
from loraplex_engine.following.machine import Machine, own_host
from loraplex_engine.following.starting import Assignment
from loraplex_engine.link.machines import Meeting, release
from tests.engine.following.first_machine import CONFIG, First, until

Follow = Callable[..., None]


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[First]:
    monkeypatch.setattr(machine, "BEAT_SECONDS", 0.02)
    first = First()
    yield first
    first.machines.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Assignment, subprocess.Popen[bytes]]]:
    """The ranks that a machine has started, the processes of which do nothing until they are told to end."""
    started: list[tuple[Assignment, subprocess.Popen[bytes]]] = []

    def start(assignment: Assignment) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        started.append((assignment, process))
        return process

    monkeypatch.setattr(machine, "start_rank", start)
    return started


Started = list[tuple[Assignment, subprocess.Popen[bytes]]]


@pytest.fixture
def follow(first: First, started: Started) -> Iterator[Follow]:
    """Has a machine follow: follow(meeting=…, machines=…, model=…)."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def follow(meeting: Meeting | None = None, machines: int = 2, model: str | None = None) -> None:
        following = Machine(meeting or first.meeting, 1, machines, "127.0.0.2", model)
        threads.append(threading.Thread(target=following.run, args=(stop,)))
        threads[-1].start()

    yield follow
    stop.set()
    for thread in threads:
        thread.join()
    assert all(process.poll() is not None for _, process in started)  # none outlives its machine


def test_it_runs_its_share_of_the_ranks_as_the_first_one_says(first: First, follow: Follow, started: Started) -> None:
    follow()
    until(lambda: not first.machines.awaited())
    assert [assignment for assignment, _ in started] == [
        Assignment(CONFIG, rank, 1, first.meeting.host, "127.0.0.2", first.meeting) for rank in (2, 3)
    ]
    assert not first.lost()


def test_the_model_may_lie_elsewhere_there(first: First, follow: Follow, started: Started) -> None:
    follow(model="/here")
    until(lambda: not first.machines.awaited())
    assert {assignment.config for assignment, _ in started} == {msgspec.structs.replace(CONFIG, model="/here")}


def test_a_new_life_of_the_engine_gets_ranks_of_its_own(first: First, follow: Follow, started: Started) -> None:
    follow()
    until(lambda: not first.machines.awaited())
    first.machines.close()
    first.listen()
    until(lambda: not first.machines.awaited())
    assert [process.poll() is None for _, process in started] == [False, False, True, True]


def test_it_says_how_a_rank_has_ended(first: First, follow: Follow, started: Started) -> None:
    follow()
    until(lambda: not first.machines.awaited())
    started[1][1].kill()
    until(lambda: list(first.machines.ended()))
    assert list(first.machines.ended()) == [
        (3, "the process of rank 3 on machine 1 (127.0.0.2) has ended with status -9")
    ]


def test_its_ranks_end_when_the_first_one_is_silent(
    first: First, follow: Follow, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow()
    until(lambda: not first.machines.awaited())
    monkeypatch.setattr(machine, "SILENT_SECONDS", 0.2)
    first.machines.close()
    until(lambda: all(process.poll() is not None for _, process in started))
    first.listen()  # and it goes on by itself
    until(lambda: not first.machines.awaited())


def test_another_secret_is_told_once(first: First, follow: Follow, caplog: pytest.LogCaptureFixture) -> None:
    follow(Meeting(first.meeting.host, first.meeting.port, b"another secret of enough characters"))
    until(lambda: "has not the secret that is here: copy the file of the server's machines_secret" in caplog.text)
    assert caplog.text.count("has not the secret that is here") == 1


def test_why_it_is_refused_is_told_once(first: First, follow: Follow, caplog: pytest.LogCaptureFixture) -> None:
    follow(machines=3)
    until(lambda: "refuses this one: machine 1 (127.0.0.2) is one of 3, and the model has machines: 2" in caplog.text)
    threading.Event().wait(0.2)  # ten more words of it
    assert caplog.text.count("refuses this one") == 1


def test_another_release_of_the_first_one_is_told(
    first: First, follow: Follow, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_machines, "frames_of", lambda answer: [b"0.0.1", msgspec.msgpack.encode(answer)])
    follow()
    until(lambda: f"it has release 0.0.1, and this machine {release()}: install the same" in caplog.text)


def test_its_own_address_is_the_one_that_reaches_the_first(first: First) -> None:
    assert own_host(first.meeting) == "127.0.0.1"
    assert own_host(Meeting("localhost", first.meeting.port, first.meeting.secret)) == "127.0.0.1"
