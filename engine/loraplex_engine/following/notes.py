"""Sums of vectors over the ranks while each reads the same adapter, in loader threads and in no common order."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.runtime.mirror import OtherLoads, Total
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.ranks.group import Notes, Watch


class Outcome(msgspec.Struct, frozen=True):
    """How a load has ended on one rank."""

    sums: list[str]  # the names of the sums that it gave a part of
    problems: list[str]  # empty: it has ended well
    reason: str  # their kind
    nbytes: int  # of what it holds now


class AdapterNotes:
    """What ranks tell each other of the loads of adapters."""

    def __init__(self, notes: Notes, shard: Shard, watch: Watch) -> None:
        """`watch`: raises that a rank has ended."""
        self._notes = notes
        self._shard = shard
        self._watch = watch
        self._parts: dict[int, list[str]] = {}  # the names of the sums of each load that runs

    def total(self, number: int) -> Total:
        """How a load adds up what the ranks of a stage have parts of. Raises AdapterRejected if another has failed."""

        def total(name: str, part: Tensor) -> Tensor:
            self._parts.setdefault(number, []).append(name)
            self._notes.put(_part(number, name, self._shard.process), part.numpy().tobytes())
            return torch.stack([self._part(number, name, rank) for rank in self._shard.peers]).sum(dim=0)

        return total

    def tell(self, number: int, rejected: AdapterRejected | None, nbytes: int = 0) -> None:
        """Say how a load has ended on this rank. nbytes: of what it has read"""
        problems, reason = ([], "") if rejected is None else (rejected.problems, rejected.reason)
        outcome = Outcome(self._parts.pop(number, []), problems, reason, nbytes)
        self._notes.put(_outcome(number, self._shard.process), msgspec.json.encode(outcome))

    def others(self, number: int) -> OtherLoads:
        """Wait until a load has ended on the other ranks too. Nothing is left of its notes."""
        ranks = range(self._shard.processes)
        found = {rank: self._wait(number, rank) for rank in ranks}
        for rank in ranks:
            self._notes.remove(_outcome(number, rank))
            for name in found[rank].sums:
                self._notes.remove(_part(number, name, rank))
        failed = {rank: each for rank, each in found.items() if each.problems and rank != self._shard.process}
        problems = [f"rank {rank}: {problem}" for rank, each in failed.items() for problem in each.problems]
        rejected = AdapterRejected(problems, min(failed.items())[1].reason) if failed else None
        return OtherLoads(rejected, max(each.nbytes for each in found.values()))

    def _wait(self, number: int, rank: int) -> Outcome:
        return msgspec.json.decode(self._notes.wait(_outcome(number, rank), self._watch), type=Outcome)

    def _part(self, number: int, name: str, rank: int) -> Tensor:
        def watch() -> None:
            self._watch()
            if self._notes.has(_outcome(number, rank)) and not self._notes.has(_part(number, name, rank)):
                raise AdapterRejected([f"{name}: its magnitudes need all ranks, and rank {rank} could not read it"])

        data = self._notes.wait(_part(number, name, rank), watch)
        return torch.from_numpy(np.frombuffer(data, np.float32).copy())


def _outcome(number: int, rank: int) -> str:
    return f"adapter/{number}/{rank}"


def _part(number: int, name: str, rank: int) -> str:
    return f"adapter/{number}/{rank}/{name}"
