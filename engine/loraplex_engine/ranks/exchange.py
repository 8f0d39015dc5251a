"""What the layers of a model need of the other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loraplex_engine.checkpoint.shard import WHOLE, Shard


class Ranks(Protocol):
    """One rank, and what it exchanges with those that compute the same model. All ranks call the same, in one order."""

    @property
    def shard(self) -> Shard: ...

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks of the stage, in place: the same bits on each."""

    def side_by_side(self, x: Tensor) -> Tensor:
        """x [L, N] of the ranks of the stage as [L, world · N] on the first of them; on the others x itself, of which
        nothing is made."""

    def pass_on(self, x: Tensor) -> None:
        """Give x to the stage after this one, from the last to the first. Nothing may change it any more."""

    def take_over(self, x: Tensor) -> Tensor:
        """x, filled with what the stage before passes on: of the same shape and dtype."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A rank that meets no other."""

    shard: Shard = WHOLE

    def add_up(self, x: Tensor) -> Tensor:
        return x

    def side_by_side(self, x: Tensor) -> Tensor:
        return x

    def pass_on(self, x: Tensor) -> None:
        pass

    def take_over(self, x: Tensor) -> Tensor:
        return x


ALONE = Alone()
