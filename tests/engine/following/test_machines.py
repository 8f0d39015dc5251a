"""A machine joins its first one by the secret alone, follows it, and both notice when the other is lost."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from loraplex_engine.following import adapter_files
from loraplex_engine.following.adapter_files import FetchedFiles
from loraplex_engine.following.other_machines import OtherMachines
from loraplex_engine.link import machines
from loraplex_engine.link.curve import Handshakes
from loraplex_engine.link.machines import (
    TO_MACHINE,
    Follow,
    Here,
    Meeting,
    OtherReleaseError,
    Refused,
    ToMachine,
    address_of,
    frames_of,
    read_frames,
    release,
)
from tests.engine.following.first_machine import CONFIG, SECRET, First, until

PATIENCE_MILLISECONDS = 20_000
HERE = Here(1, 2, "10.0.0.6", "one", "", {})


@pytest.fixture
def first() -> Iterator[First]:
    first = First()
    yield first
    first.machines.close()


class Second:
    """What another machine says, word by word."""

    def __init__(self, meeting: Meeting) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        meeting.keys.join(self.socket)
        self.handshakes = Handshakes(self.socket)
        self.socket.connect(meeting.endpoint)

    def say(self, **changes: Any) -> ToMachine:
        """The answer to a word with these changes."""
        return read_frames(self.said(frames_of(msgspec.structs.replace(HERE, **changes))), TO_MACHINE)

    def said(self, frames: list[bytes]) -> list[bytes]:
        """What is answered to these frames."""
        self.socket.send_multipart(frames)
        assert self.socket.poll(PATIENCE_MILLISECONDS)
        return self.socket.recv_multipart()

    def follow(self) -> str:
        """Be told what to run, and run it: the life that it is of."""
        order = self.say()
        assert isinstance(order, Follow)
        self.say(life=order.life)
        return order.life

    def close(self) -> None:
        with self.handshakes:
            pass
        self.socket.close()
        self._context.term()


@pytest.fixture
def second(first: First) -> Iterator[Second]:
    second = Second(first.meeting)
    yield second
    second.close()


def test_a_machine_is_told_what_to_load_and_again_what_it_missed(first: First, second: Second) -> None:
    answers = [second.say(), second.say()]
    assert answers[0] == answers[1]
    assert isinstance(answers[0], Follow)
    assert answers[0].config == CONFIG
    assert not first.lost()


def test_the_first_one_says_what_it_waits_for_until_all_follow(first: First, second: Second) -> None:
    assert first.machines.awaited().startswith("machine 1 (run `loraplex follow` there; it comes to tcp://")
    second.follow()
    assert not first.machines.awaited()


def test_both_ends_are_told_of_another_secret(first: First) -> None:
    stranger = Second(Meeting(first.meeting.host, first.meeting.port, b"another secret of enough characters"))
    until(lambda: stranger.handshakes.ended()[:1] == [False])
    until(lambda: "it has not the secret of machines_secret" in first.machines.awaited())
    stranger.close()


def test_who_has_no_keys_is_not_answered(first: First) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(first.meeting.endpoint)
        stranger.send_multipart(frames_of(HERE))
        until(lambda: "it has not the secret of machines_secret" in first.machines.awaited())
        assert not stranger.poll(0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"machines": 3}, "is one of 3, and the model has machines: 2"),
        ({"index": 2}, "its index must be from 1 to 1"),
        ({"index": 0}, "its index must be from 1 to 1"),
    ],
)
def test_a_machine_that_does_not_fit_is_told_why(
    first: First, second: Second, changes: dict[str, Any], problem: str
) -> None:
    answer = second.say(**changes)
    assert isinstance(answer, Refused)
    assert problem in answer.problem
    assert problem in first.machines.awaited()


def test_another_release_is_named_at_both_ends_before_its_words_are_read(
    first: First, second: Second, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = second.said([b"0.0.1", b"in whatever form 0.0.1 may have had it"])
    assert f"it has release 0.0.1, and this machine {release()}: install the same" in first.machines.awaited()
    monkeypatch.setattr(machines, "release", lambda: "0.0.1")
    with pytest.raises(OtherReleaseError, match=r"and this machine 0\.0\.1: install the same"):
        read_frames(answer, TO_MACHINE)


def test_what_cannot_be_read_is_refused(first: First, second: Second) -> None:
    for frames in ([release().encode()], [release().encode(), b"\xc1"], [release().encode(), b"a", b"b"]):
        answer = read_frames(second.said(frames), TO_MACHINE)
        assert isinstance(answer, Refused)
        assert "cannot be read" in answer.problem


Story = Callable[[First, Second, str], object]


@pytest.mark.parametrize(
    ("story", "problem"),
    [
        (lambda first, second, life: second.say(instance="two"), "machine 1 (10.0.0.6) was started anew"),
        (lambda first, second, life: second.say(life=""), "has given its ranks up"),
        (lambda first, second, life: setattr(first, "now", 31.0), "has said nothing for 30 s"),
    ],
    ids=["started anew", "gave up", "silent"],
)
def test_a_machine_that_is_lost_is_named(first: First, second: Second, story: Story, problem: str) -> None:
    life = second.follow()
    assert not first.lost()
    story(first, second, life)
    until(lambda: problem in first.lost())


def test_silence_is_noticed_while_others_speak(first: First, second: Second) -> None:
    second.follow()
    first.now = 31.0
    for _ in range(1000):  # of no machine's index: they are not of the one that is silent
        second.say(index=7)
        if "has said nothing for 30 s" in first.lost():
            break
    assert "has said nothing for 30 s" in first.lost()


def test_a_rank_that_has_ended_there_is_known_here(first: First, second: Second) -> None:
    life = second.follow()
    assert list(first.machines.ended()) == []
    second.say(life=life, ended={3: -9})
    assert list(first.machines.ended()) == [
        (3, "the process of rank 3 on machine 1 (10.0.0.6) has ended with status -9")
    ]


def test_what_ended_in_a_life_before_is_not_of_this_one(first: First, second: Second) -> None:
    second.say(life="of an engine before", ended={2: 1})
    assert list(first.machines.ended()) == []


def test_an_address_that_is_taken_is_named(first: First) -> None:
    with pytest.raises(OSError, match=r"machines_listen tcp://127.0.0.1:.*Address already in use"):
        OtherMachines(first.meeting, CONFIG, 1)


def test_a_name_that_does_not_resolve_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [socket.gaierror(-2, "Name or service not known")] * 2

    def resolve(host: str) -> str:
        if left:
            raise left.pop()
        return "10.0.0.5"

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(machines, "RESOLVING_SECONDS", 0.0)
    told: list[str] = []
    assert address_of("leader-0.group", told.append) == "10.0.0.5"
    assert told == ["the name 'leader-0.group' to resolve (Name or service not known)"]


def test_the_files_of_an_adapter_come_as_they_are_while_it_is_loaded(
    first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "PIECE_BYTES", 1000)
    written = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 10}
    for name, data in {**written, "secret.txt": b"not an adapter's"}.items():
        (tmp_path / name).write_bytes(data)
    fetched = FetchedFiles(first.meeting)
    first.machines.files.offer(7, [tmp_path])
    with fetched(7, [tmp_path]) as (here,):
        assert here != tmp_path
        assert {file.name: file.read_bytes() for file in here.iterdir()} == written
    assert not here.exists()
    first.machines.files.withdraw(7)
    with pytest.raises(OSError, match="no adapter of load 7 is offered"), fetched(7, [tmp_path]):
        pass


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("10.0.0.5", "HOST:PORT is expected"),
        ("10.0.0.5:0", "HOST:PORT is expected"),
        ("10.0.0.5:70000", "HOST:PORT is expected"),
        ("0.0.0.0:50055", "say the one by which the others reach it"),
    ],
)
def test_an_address_where_nobody_could_come_is_refused(tmp_path: Path, address: str, problem: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    with pytest.raises(ValueError, match=problem):
        Meeting.at(address, str(secret))


def test_a_secret_that_could_be_guessed_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    with pytest.raises(ValueError, match="secret cannot be read: No such file"):
        Meeting.at("10.0.0.5:50055", str(secret))
    secret.write_text("hunter2\n")
    with pytest.raises(ValueError, match="has 7 bytes, and at least 32 are needed"):
        Meeting.at("10.0.0.5:50055", str(secret))
