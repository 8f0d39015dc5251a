"""Tenants take turns, and what nobody waits for is not begun."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Event

import pytest

from loraplex_engine.scheduling.compiling import NICER, TurnQueue


class Bench:
    """A queue with one thread, which is busy until the test lets it go on."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.begun, self.may_go_on = Event(), Event()
        self.queue = TurnQueue(self._make, 1, "test")
        self.futures: dict[str, Future[str]] = {}
        self.add("nobody", "first")
        self.begun.wait()

    def add(self, tenant: str, key: str) -> Future[str]:
        future = self.futures.setdefault(key, Future())
        self.queue.add(tenant, key, future)
        return future

    def finish(self) -> list[str]:
        """What was made after the first, in order."""
        self.may_go_on.set()
        for future in self.futures.values():
            if not future.cancelled():
                future.result()
        return self.made[1:]

    def _make(self, key: str) -> str:
        self.begun.set()
        self.may_go_on.wait()
        self.made.append(key)
        return key.upper()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.may_go_on.set()
    bench.queue.close()


def test_tenants_take_turns_however_much_one_asks_for(bench: Bench) -> None:
    for key in ("a1", "a2", "a3"):
        bench.add("a", key)
    bench.add("b", "b1")
    assert bench.finish() == ["a1", "b1", "a2", "a3"]


def test_what_nobody_waits_for_is_not_begun(bench: Bench) -> None:
    gone = bench.add("a", "a1")
    bench.add("a", "a2")
    assert bench.queue.remove("a", "a1")
    assert gone.cancelled()
    assert bench.finish() == ["a2"]


def test_what_another_tenant_waits_for_is_made(bench: Bench) -> None:
    bench.add("a", "x")
    bench.add("b", "x")
    assert not bench.queue.remove("a", "x")
    assert bench.finish() == ["x"]


def test_what_two_tenants_want_is_made_once_at_the_first_turn(bench: Bench) -> None:
    for key in ("a1", "a2", "x"):
        bench.add("a", key)
    bench.add("b", "x")
    assert bench.finish() == ["a1", "x", "a2"]


def test_what_is_asked_for_again_is_made_once(bench: Bench) -> None:
    bench.add("a", "a1")
    bench.add("a", "a1")
    assert bench.finish() == ["a1"]


def test_what_is_being_made_cannot_be_let_go_of(bench: Bench) -> None:
    assert not bench.queue.remove("nobody", "first")
    assert bench.finish() == []
    assert bench.futures["first"].result() == "FIRST"


def test_who_waits_is_told_of_an_error() -> None:
    queue: TurnQueue[str, int] = TurnQueue(int, 1, "test")
    future: Future[int] = Future()
    queue.add("a", "x", future)
    with pytest.raises(ValueError, match="invalid literal"):
        future.result()
    queue.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_the_threads_give_way_to_the_steps() -> None:
    def niceness(key: str) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    queue = TurnQueue(niceness, 1, "test")
    future: Future[int] = Future()
    queue.add("a", "x", future)
    assert future.result() == min(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + NICER, 19)
    queue.close()
