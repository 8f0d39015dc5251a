"""The first rank's hold on the others: it starts their processes, notes when one ends, and tells them of adapters."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.mirror import OtherLoads, Total
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.execution.orders import Forget, Load, Put, Remove, Report, encode
from loraplex_engine.following.notes import AdapterNotes
from loraplex_engine.following.other_machines import OtherMachines
from loraplex_engine.following.ready import LoadWatch, RankReady, files_digest, loaded_note
from loraplex_engine.following.starting import Assignment, end_ranks, start_rank
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.host_memory import resident_bytes
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.machines import LOOPBACK, Meeting, address_of
from loraplex_engine.link.messages import RankStats
from loraplex_engine.ranks.group import Group, Notes, RanksLostError, Watch

LOOKING_SECONDS = 0.1  # between two looks for machines that have not come yet


class Leader:
    """The other ranks of a model, as the first one sees them. It is the `Mirror` of the adapters on it."""

    def __init__(self, config: EngineConfig, path: Path, report: LoadReport, meeting: Meeting | None = None) -> None:
        """Start the processes of the other ranks on this machine, which load the model in `path`.

        `meeting`: where the other machines come, which start theirs. Raises ValueError where they have nowhere to come,
        OSError where they cannot come there.
        """
        if (config.machines > 1) != (meeting is not None):
            raise ValueError(f"machines: {config.machines}, and where they meet, go together (machines_listen)")
        self.shard = Shard.of_process(0, config.tensor_parallel, config.pipeline_parallel)
        self._report = report
        if meeting is not None:
            meeting = msgspec.structs.replace(meeting, host=address_of(meeting.host, report.waits))
        self._host = LOOPBACK if meeting is None else meeting.host
        self._notes = Notes(None, config.world, self._host)
        self._adapters = AdapterNotes(self._notes, self.shard, self.check)
        self._numbers = itertools.count(1)
        self._files = files_digest(path)
        self._ranks = range(1, config.world)
        self.figures: list[RankStats] = []  # of all ranks, since the last beat
        self._group: Group
        self._machines = None if meeting is None else OtherMachines(meeting, config, self._notes.port)
        own = msgspec.structs.replace(config, model=str(path), revision=None)
        self._processes = {
            rank: start_rank(Assignment(own, rank, self._notes.port, self._host, self._host))
            for rank in range(1, config.machine_ranks)
        }

    @property
    def pids(self) -> list[int]:
        """The processes of the other ranks on this machine."""
        return [process.pid for process in self._processes.values()]

    def join(self, device: torch.device) -> Group:
        """Wait until all ranks are there. Raises RanksLostError if one ends."""
        self._wait_for_machines()
        watch = self._load_watch("the processes of its other ranks")
        self._group = Group(self.shard, self._notes, device, watch, self._host)
        return self._group

    def _wait_for_machines(self) -> None:
        """Wait until all other machines run their ranks. The report is told of each that is missing once."""
        told = ""
        while self._machines is not None and (awaited := self._machines.awaited()):
            if awaited != told:
                told = awaited
                self._report.waits(awaited)
            self.check()
            time.sleep(LOOKING_SECONDS)

    def wait_loaded(self) -> int:
        """Wait until the others have loaded their shares → the least memory that is free on the device of one.

        Raises ValueError with the problem of one that could not, RanksLostError if one ends.
        """
        return min(self._ready(rank, self._load_watch(f"rank {rank}")).free_bytes for rank in self._ranks)

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
        if ready.files != self._files:
            raise ValueError(f"rank {rank} has read other files than the first one: copy the model to its machine anew")
        return ready

    def check(self) -> None:
        """Raise RanksLostError if another rank or machine is lost; ValueError if it said why, while it loaded."""
        for rank, how in self._ended():
            if self._notes.has(loaded_note(rank)):
                self._ready(rank, lambda: None)
            raise RanksLostError(how)
        if self._machines is not None:
            self._machines.check()

    def _ended(self) -> Iterator[tuple[int, str]]:
        """Each rank whose process has ended, and how."""
        for rank, process in self._processes.items():
            status = process.poll()
            if status is not None:
                yield rank, f"the process of rank {rank} (pid {process.pid}) has ended with status {status}"
        if self._machines is not None:
            yield from self._machines.ended()

    def beat(self) -> None:
        """Wait until all other ranks have said what they have exchanged and hold.

        One that stands still holds this up, and thereby the answer to the ping that the service waits for.
        """
        self._group.order(encode(Report()))
        self.figures = self._group.figures(resident_bytes())

    def close(self) -> None:
        """End the other ranks."""
        end_ranks(self._processes.values())
        if self._machines is not None:
            self._machines.close()

    # ---- the mirror of adapters ------------------------------------------------------------------------------------

    def load(self, key: AdapterKey, paths: Sequence[Path]) -> int:
        number = next(self._numbers)
        if self._machines is not None:
            self._machines.files.offer(number, paths)
        self._group.order(encode(Load(number, key, [str(path) for path in paths])))
        return number

    def total(self, number: int) -> Total:
        return self._adapters.total(number)

    def finish(self, number: int, rejected: AdapterRejected | None) -> OtherLoads:
        self._adapters.tell(number, rejected)
        failed = self._adapters.others(number)
        if self._machines is not None:
            self._machines.files.withdraw(number)
        return failed

    def forget(self, number: int) -> None:
        self._group.order(encode(Forget(number)))

    def put(self, slot: int, number: int) -> None:
        self._group.order(encode(Put(slot, number)))

    def remove(self, slot: int) -> None:
        self._group.order(encode(Remove(slot)))
