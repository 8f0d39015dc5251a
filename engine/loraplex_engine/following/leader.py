"""The first rank's hold on the others: it starts their processes, notes when one ends, and tells them of adapters."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.mirror import OtherLoads, Total
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.execution.orders import Forget, Load, Put, Remove, Report, encode
from loraplex_engine.following.notes import AdapterNotes
from loraplex_engine.following.ready import LoadWatch, RankReady, loaded_note
from loraplex_engine.link.child import child_command
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.host_memory import resident_bytes
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.logs import log_options
from loraplex_engine.link.messages import RankStats
from loraplex_engine.ranks.group import Group, Notes, RanksLostError, Watch

logger = logging.getLogger(__name__)

ENDING_SECONDS = 5.0  # for the ranks that are told to end, before they are killed


class Leader:
    """The other ranks of a model, as the first one sees them. It is the `Mirror` of the adapters on it."""

    def __init__(self, config: EngineConfig, path: Path, report: LoadReport) -> None:
        """Start the processes of the other ranks, which load the model in `path`."""
        self.shard = Shard.of_process(0, config.tensor_parallel, config.pipeline_parallel)
        self._report = report
        self._notes = Notes(None, config.world)
        self._adapters = AdapterNotes(self._notes, self.shard, self.check)
        self._numbers = itertools.count(1)
        config = msgspec.structs.replace(config, model=str(path), revision=None)
        ranks = range(1, config.world)
        self.figures: list[RankStats] = []  # of all ranks, since the last beat
        self._group: Group
        self._processes = {rank: _start(config, rank, self._notes.port) for rank in ranks}

    @property
    def pids(self) -> list[int]:
        """The processes of the other ranks."""
        return [process.pid for process in self._processes.values()]

    def join(self, device: torch.device) -> Group:
        """Wait until all ranks are there. Raises RanksLostError if one ends."""
        self._group = Group(self.shard, self._notes, device, self._load_watch("the processes of its other ranks"))
        return self._group

    def wait_loaded(self) -> int:
        """Wait until the others have loaded their shares → the least memory that is free on the device of one.

        Raises ValueError with the problem of one that could not, RanksLostError if one ends.
        """
        return min(self._ready(rank, self._load_watch(f"rank {rank}")).free_bytes for rank in self._processes)

    def _load_watch(self, awaited: str) -> Watch:
        """What looks after the other ranks while they load. One that stands still is the service's to notice."""
        load = LoadWatch(self._notes, self._report, awaited)

        def watch() -> None:
            self.check()
            load.check()

        return watch

    def _ready(self, rank: int, watch: Watch) -> RankReady:
        ready = msgspec.json.decode(self._notes.wait(loaded_note(rank), watch), type=RankReady)
        if ready.problem:
            raise ValueError(f"rank {rank}: {ready.problem}")
        return ready

    def check(self) -> None:
        """Raise RanksLostError if the process of another rank has ended; ValueError if it said why, while it loaded."""
        for rank, process in self._processes.items():
            status = process.poll()
            if status is None:
                continue
            if self._notes.has(loaded_note(rank)):
                self._ready(rank, lambda: None)
            raise RanksLostError(f"the process of rank {rank} (pid {process.pid}) has ended with status {status}")

    def beat(self) -> None:
        """Wait until all other ranks have said what they have exchanged and hold.

        One that stands still holds this up, and thereby the answer to the ping that the service waits for.
        """
        self._group.order(encode(Report()))
        self.figures = self._group.figures(resident_bytes())

    def close(self) -> None:
        """End the other ranks."""
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        end = time.monotonic() + ENDING_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ---- the mirror of adapters ------------------------------------------------------------------------------------

    def load(self, key: AdapterKey, paths: Sequence[Path]) -> int:
        number = next(self._numbers)
        self._group.order(encode(Load(number, key, [str(path) for path in paths])))
        return number

    def total(self, number: int) -> Total:
        return self._adapters.total(number)

    def finish(self, number: int, rejected: AdapterRejected | None) -> OtherLoads:
        self._adapters.tell(number, rejected)
        return self._adapters.others(number)

    def forget(self, number: int) -> None:
        self._group.order(encode(Forget(number)))

    def put(self, slot: int, number: int) -> None:
        self._group.order(encode(Put(slot, number)))

    def remove(self, slot: int) -> None:
        self._group.order(encode(Remove(slot)))


def _start(config: EngineConfig, rank: int, port: int) -> subprocess.Popen[bytes]:
    """Start the process of a rank."""
    where = ("--rank", str(rank), "--port", str(port), "--name", Path(config.model).name)
    command, variables = child_command("loraplex_engine.following", *where, *log_options())
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | variables)
    assert process.stdin is not None
    with suppress(OSError):  # it died at once, which the wait for it reports
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        process.stdin.flush()
    logger.info("rank %d of %d is process %d", rank, config.world, process.pid)
    return process
