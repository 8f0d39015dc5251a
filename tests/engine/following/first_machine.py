"""A first machine for tests of those that follow it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from loraplex_engine.following.other_machines import OtherMachines
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.machines import LOOPBACK, Meeting
from loraplex_engine.ranks.group import RanksLostError

SECRET = b"0123456789abcdef" * 2
CONFIG = EngineConfig(model="/model", tensor_parallel=4, machines=2, device="cpu")


class First:
    """A first machine with a clock of its own."""

    def __init__(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as free:
            self.meeting = Meeting(LOOPBACK, free.getsockname()[1], SECRET)
        self.now = 0.0
        self.listen()

    def listen(self) -> None:
        """Begin a life of the engine."""
        self.machines = OtherMachines(self.meeting, CONFIG, 1, lambda: self.now)

    def lost(self) -> str:
        """What `check` says."""
        try:
            self.machines.check()
        except RanksLostError as error:
            return str(error)
        return ""


def until(done: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    pause = threading.Event()
    for _ in range(400):
        if done():
            return
        pause.wait(0.05)
    pytest.fail("it never came about")
