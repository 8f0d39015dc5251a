"""One rank's share of a model that several ranks compute together."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_engine.checkpoint.model_config import ModelError


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of one of `world` ranks."""

    rank: int
    world: int

    def part(self, size: int, unit: int, may_share: bool = False) -> slice:
        """The range of `size` features that this rank holds, made of whole units.

        may_share: where there are fewer units than ranks, several ranks hold the same unit.

        Raises ModelError if the ranks cannot hold equally many.
        """
        units = size // unit
        if units % self.world and not (may_share and self.world % units == 0):
            raise ModelError(
                f"{size} features in {units} units cannot be divided equally among {self.world} ranks: take a number "
                "of ranks that divides them"
            )
        first, end = self.rank * units // self.world, (self.rank + 1) * units // self.world
        return slice(first * unit, max(first + 1, end) * unit)

    def stretch(self, size: int) -> slice:
        """The range of `size` rows that this rank holds where the last may hold fewer than the others."""
        width = self.widest(size)
        return slice(min(self.rank * width, size), min((self.rank + 1) * width, size))

    def widest(self, size: int) -> int:
        """The rows that the first rank holds of so many."""
        return -(-size // self.world)


WHOLE = Shard(0, 1)
