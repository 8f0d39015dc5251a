"""`python -m loraplex_engine.following.machine`: a machine that follows. It runs the ranks that the first one says.

It knows no model before it is told, and waits as long as it takes. It ends its ranks when the engine that they belong
to is replaced, or is silent for long; itself it goes on, until SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from types import FrameType
from typing import Final

import msgspec
import zmq

from loraplex_engine.following.starting import Assignment, end_ranks, start_rank
from loraplex_engine.link.curve import Handshakes
from loraplex_engine.link.logs import LOG_FORMATS, set_up_logging
from loraplex_engine.link.machines import (
    BEAT_SECONDS,
    MAX_FRAME_BYTES,
    SILENT_SECONDS,
    TO_MACHINE,
    Follow,
    Here,
    Meeting,
    Refused,
    address_of,
    frames_of,
    read_frames,
)

logger = logging.getLogger(__name__)

QUEUED_WORDS: Final = 4  # for a first machine that does not read
FAILED_HANDSHAKES: Final = 3  # in a row: one may fail because the first machine is being replaced


class Machine:
    """This machine, among those that compute a model together."""

    def __init__(self, meeting: Meeting, index: int, machines: int, host: str, model: str | None) -> None:
        """`host`: by which the others reach this one. `model`: where its files are here; None: as on the first one."""
        self._meeting = meeting
        self._here = Here(index, machines, host, secrets.token_hex(8), "", {})
        self._model = model
        self._life = ""
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._heard = 0.0  # when the first machine said something last
        self._failed_handshakes = 0
        self._problem = ""  # that was logged last

    def run(self, stop: threading.Event) -> None:
        """Follow until `stop` is set."""
        with zmq.Context(io_threads=1) as context, context.socket(zmq.DEALER) as joined, Handshakes(joined) as ends:
            self._connect(joined)
            logger.info("machine %d waits for the first one at %s", self._here.index, self._meeting.endpoint)
            try:
                while not stop.is_set():
                    self._say(joined)
                    self._listen(joined, stop)
                    self._look(ends)
            finally:
                self._leave()

    def _connect(self, joined: zmq.Socket[bytes]) -> None:
        self._meeting.keys.join(joined)
        for option, value in (
            (zmq.IMMEDIATE, 1),  # nothing is kept for a first machine that is not there
            (zmq.SNDHWM, QUEUED_WORDS),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.LINGER, 0),
        ):
            joined.setsockopt(option, value)
        joined.connect(self._meeting.endpoint)

    def _say(self, joined: zmq.Socket[bytes]) -> None:
        ended = {rank: status for rank, process in self._ranks.items() if (status := process.poll()) is not None}
        here = msgspec.structs.replace(self._here, life=self._life, ended=ended)
        try:
            joined.send_multipart(frames_of(here), zmq.NOBLOCK)
        except zmq.Again:
            logger.debug("the first machine is not there")

    def _listen(self, joined: zmq.Socket[bytes], stop: threading.Event) -> None:
        """Hear the first machine until it is time for the next word."""
        next_word = time.monotonic() + BEAT_SECONDS
        while (left := next_word - time.monotonic()) > 0 and not stop.is_set():
            if joined.poll(round(1000 * left) + 1):
                self._hear(joined.recv_multipart())

    def _hear(self, frames: list[bytes]) -> None:
        try:
            answer = read_frames(frames, TO_MACHINE)
        except ValueError as error:
            self._tell(f"the first machine at {self._meeting.endpoint} cannot be followed: {error}")
            return
        match answer:
            case Follow() as order:
                self._heard = time.monotonic()
                if order.life != self._life:
                    self._leave()
                    self._follow(order)
            case Refused(problem):
                self._tell(f"the first machine at {self._meeting.endpoint} refuses this one: {problem}")

    def _look(self, ends: Handshakes) -> None:
        """Notice that the first machine is another one, or silent."""
        for succeeded in ends.ended():
            self._failed_handshakes = 0 if succeeded else self._failed_handshakes + 1
        if self._failed_handshakes >= FAILED_HANDSHAKES:
            self._tell(
                f"who listens at {self._meeting.endpoint} has not the secret that is here: copy the file of the "
                "server's machines_secret to this machine"
            )
        if self._life and time.monotonic() - self._heard > SILENT_SECONDS:
            logger.warning("the first machine has said nothing for %g s: its ranks end", SILENT_SECONDS)
            self._leave()

    def _tell(self, problem: str) -> None:
        """Say once what the operator can do something about."""
        if problem != self._problem:
            self._problem = problem
            logger.error("%s", problem)

    def _follow(self, order: Follow) -> None:
        config = order.config
        if self._model is not None:
            config = msgspec.structs.replace(config, model=self._model, revision=None)
        self._life, self._problem = order.life, ""
        first = self._here.index * config.machine_ranks
        leader = self._meeting.host
        for rank in range(first, first + config.machine_ranks):
            assignment = Assignment(config, rank, order.port, leader, self._here.host, self._meeting)
            self._ranks[rank] = start_rank(assignment)

    def _leave(self) -> None:
        end_ranks(self._ranks.values())
        self._ranks.clear()
        self._life = ""


def own_host(meeting: Meeting) -> str:
    """The address from which this machine would reach the first one. Raises OSError where no way leads there."""
    first = address_of(meeting.host, lambda awaited: logger.info("waiting for %s", awaited))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((first, meeting.port))
        return str(probe.getsockname()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loraplex_engine.following.machine", description="A machine that follows. See `loraplex follow`."
    )
    parser.add_argument("--leader", required=True, metavar="HOST:PORT", help="where the first machine listens")
    parser.add_argument("--secret", required=True, metavar="FILE")
    parser.add_argument("--machines", type=int, required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--host")
    parser.add_argument("--model")
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", default="text", choices=LOG_FORMATS)
    arguments = parser.parse_args()
    set_up_logging(arguments.log_level, arguments.log_format, f"machine[{arguments.index}:{os.getpid()}]")
    meeting = Meeting.at(arguments.leader, arguments.secret)
    machine = Machine(
        meeting, arguments.index, arguments.machines, arguments.host or own_host(meeting), arguments.model
    )
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    machine.run(stop)


if __name__ == "__main__":
    main()
