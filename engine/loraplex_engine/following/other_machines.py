"""The other machines of a model, as its first rank sees them: a thread answers what they say, and reads them files."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import zmq

from loraplex_engine.following.adapter_files import OfferedFiles
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.curve import Handshakes
from loraplex_engine.link.machines import (
    FROM_MACHINE,
    MAX_FRAME_BYTES,
    SILENT_SECONDS,
    Follow,
    Here,
    Meeting,
    OtherReleaseError,
    Refused,
    ToMachine,
    UnreadableError,
    frames_of,
    read_frames,
)
from loraplex_engine.ranks.group import RanksLostError

logger = logging.getLogger(__name__)

LOOKING_MILLISECONDS: Final = 100  # after which it looks whether somebody has fallen silent, if nobody speaks


@dataclass(frozen=True, slots=True)
class _Machine:
    """What was heard of a machine last."""

    here: Here
    at: float
    follows: bool  # whether it runs ranks of this life


class OtherMachines:
    """Those that a model has beside this one. `check` says when one of them is lost, for whatever reason."""

    def __init__(
        self,
        meeting: Meeting,
        config: EngineConfig,
        notes_port: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to answer. `config`: what their ranks load; `notes_port`: where the first rank has opened the notes.
        `meeting`: its host is an address.

        Raises OSError where the address cannot be had.
        """
        self.files = OfferedFiles()
        self._life = secrets.token_hex(8)
        self._follow = Follow(self._life, config, notes_port)
        self._num_machines = config.machines
        self._meeting = meeting
        self._clock = clock
        self._machines: dict[int, _Machine] = {}
        self._lost = ""
        self._refused = ""  # why somebody could not be taken, last
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._answer_all, name="machines", daemon=True)
        with ExitStack() as opened:
            context = opened.enter_context(zmq.Context(io_threads=1))
            self._socket = opened.enter_context(context.socket(zmq.ROUTER))
            opened.callback(meeting.keys.listen(context, self._socket).stop)
            self._handshakes = opened.enter_context(Handshakes(self._socket))
            self._bind()
            self._opened = opened.pop_all()
        self._thread.start()
        logger.info("waiting for %d other machines at %s", config.machines - 1, meeting.endpoint)

    def awaited(self) -> str:
        """What is missing before all other machines run ranks of this engine; "": nothing."""
        with self._lock:
            there = {index for index, each in self._machines.items() if each.follows}
            missing = [index for index in range(1, self._num_machines) if index not in there]
            refused = f"; one that came was refused: {self._refused}" if self._refused else ""
        if not missing:
            return ""
        where = self._meeting.endpoint
        return f"machine {missing[0]} (run `loraplex follow` there; it comes to {where}){refused}"

    def check(self) -> None:
        """Raise RanksLostError if a machine that ran ranks of this engine is silent or has given them up."""
        with self._lock:
            if self._lost:
                raise RanksLostError(self._lost)

    def ended(self) -> Iterator[tuple[int, str]]:
        """Each rank whose process has ended, and how."""
        with self._lock:
            machines = list(self._machines.values())
        for each in machines:
            for rank, status in each.here.ended.items() if each.follows else ():
                yield rank, f"the process of rank {rank} on {_named(each.here)} has ended with status {status}"

    def close(self) -> None:
        """Answer no more. The others notice, and end their ranks."""
        self._closing.set()
        self._thread.join()
        self._opened.close()

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(self._meeting.endpoint)  # of an address: it does not listen at names
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"machines_listen {self._meeting.endpoint}: {error.strerror}") from error

    def _answer_all(self) -> None:
        try:
            while not self._closing.is_set():
                if self._socket.poll(LOOKING_MILLISECONDS):
                    sender, *frames = self._socket.recv_multipart()
                    self._socket.send_multipart([sender, *frames_of(self._answer(frames))])
                self._look()  # however much is said: one may be silent while others speak
        except Exception as error:
            logger.exception("the other machines are answered no more")
            self._lose(f"the other machines are answered no more: {error}")

    def _answer(self, frames: list[bytes]) -> ToMachine:
        try:
            message = read_frames(frames, FROM_MACHINE)
        except OtherReleaseError as error:
            return self._refuse(str(error))
        except UnreadableError as error:
            return self._refuse(f"it said what cannot be read: {error}")
        return self._take(message) if isinstance(message, Here) else self.files.answer(message)

    def _take(self, here: Here) -> ToMachine:
        problem = self._problem(here)
        if problem:
            return self._refuse(problem)
        before, follows = self._machines.get(here.index), here.life == self._life
        if before is None:
            logger.info("%s has joined", _named(here))
        elif before.follows and before.here.instance != here.instance:
            self._lose(f"{_named(here)} was started anew, or there are two of that index")
        elif before.follows and not follows:
            self._lose(f"{_named(here)} has given its ranks up, since it heard nothing from the first machine")
        with self._lock:
            self._machines[here.index] = _Machine(here, self._clock(), follows)
        return self._follow

    def _problem(self, here: Here) -> str:
        """Why a machine cannot be taken; "": it can."""
        machines = self._num_machines
        if here.machines != machines:
            return f"{_named(here)} is one of {here.machines}, and the model has machines: {machines}: set the same"
        if not 0 < here.index < machines:
            return f"{_named(here)}: its index must be from 1 to {machines - 1}; 0 is the first machine"
        return ""

    def _refuse(self, problem: str) -> Refused:
        with self._lock:
            news, self._refused = problem != self._refused, problem
        if news:
            logger.warning("another machine is refused: %s", problem)
        return Refused(problem)

    def _look(self) -> None:
        if not all(self._handshakes.ended()):
            self._refuse("it has not the secret of machines_secret")
        for each in list(self._machines.values()):
            if each.follows and self._clock() - each.at > SILENT_SECONDS:
                self._lose(f"{_named(each.here)} has said nothing for {SILENT_SECONDS:g} s")

    def _lose(self, why: str) -> None:
        with self._lock:
            self._lost = self._lost or why


def _named(here: Here) -> str:
    return f"machine {here.index} ({here.host})"
