"""The start of a rank's process: by the first rank on its own machine, by a machine that follows on another."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from loraplex_engine.link.child import child_command
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.logs import log_options
from loraplex_engine.link.machines import LOOPBACK, Meeting

logger = logging.getLogger(__name__)

ENDING_SECONDS: Final = 5.0  # for the ranks that are told to end, before they are killed


class Assignment(msgspec.Struct, frozen=True):
    """What a rank that follows is told."""

    config: EngineConfig
    rank: int
    port: int  # where the first rank has opened the notes
    leader: str = LOOPBACK  # on which host
    host: str = LOOPBACK  # of this rank, as the others reach it
    meeting: Meeting | None = None  # where the files of adapters are read from; None: they are on this machine


def start_rank(assignment: Assignment) -> subprocess.Popen[bytes]:
    """Start the process of a rank. It ends with this one."""
    rank, config = assignment.rank, assignment.config
    where = ("--rank", str(rank), "--name", Path(config.model).name)
    command, variables = child_command("loraplex_engine.following", *where, *log_options())
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | variables)
    assert process.stdin is not None
    with suppress(OSError):  # it died at once, which the wait for it reports
        process.stdin.write(msgspec.json.encode(assignment) + b"\n")
        process.stdin.flush()
    logger.info("rank %d of %d is process %d", rank, config.world, process.pid)
    return process


def end_ranks(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the processes of ranks, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    end = time.monotonic() + ENDING_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
