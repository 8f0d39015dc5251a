"""The other ranks of a model, each of which has its own part of every adapter in the same slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.key import AdapterKey

# From the name of a tensor and this rank's part of its sum to the sum over all ranks. Waits for them.
Total = Callable[[str, Tensor], Tensor]


def own_total(name: str, part: Tensor) -> Tensor:
    """The sum where there is one rank."""
    return part


@dataclass(frozen=True, slots=True)
class OtherLoads:
    """How a load has ended on the other ranks."""

    rejected: AdapterRejected | None = None  # why one failed; None: well
    nbytes: int = 0  # the most that one of them holds


class Mirror(Protocol):
    """What the other ranks are told. Called from the thread that steps, but for the waits."""

    def load(self, key: AdapterKey, paths: Sequence[Path]) -> int:
        """Have them read an adapter, too → the number of this load."""

    def total(self, number: int) -> Total:
        """How a load, in its own thread, adds up what each rank has a part of."""

    def finish(self, number: int, rejected: AdapterRejected | None) -> OtherLoads:
        """Say how a load has ended here and wait for the others, in its own thread."""

    def forget(self, number: int) -> None:
        """Have them drop what they have read, if they could read it."""

    def put(self, slot: int, number: int) -> None:
        """Have them put what was loaded into a slot, before the next step."""

    def remove(self, slot: int) -> None:
        """Have them clear a slot, before the next step."""


class NoMirror:
    """There are no other ranks."""

    def load(self, key: AdapterKey, paths: Sequence[Path]) -> int:
        return 0

    def total(self, number: int) -> Total:
        return own_total

    def finish(self, number: int, rejected: AdapterRejected | None) -> OtherLoads:
        return OtherLoads()

    def forget(self, number: int) -> None:
        pass

    def put(self, slot: int, number: int) -> None:
        pass

    def remove(self, slot: int) -> None:
        pass


NO_MIRROR = NoMirror()
