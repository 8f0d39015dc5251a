"""One rank's share of a model that several ranks compute together."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_engine.checkpoint.model_config import ModelError


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of one rank: of `world` that divide each layer's matrices, in one of `stages` that divide the layers.

    Tokens come in at the first stage, and logits leave there: it has the embedding and the head.
    """

    rank: int  # within its stage
    world: int  # ranks of a stage
    stage: int = 0
    stages: int = 1

    @classmethod
    def of_process(cls, process: int, world: int, stages: int) -> Shard:
        """The share of a process by its number: those of a stage follow each other."""
        stage, rank = divmod(process, world)
        return cls(rank, world, stage, stages)

    @property
    def process(self) -> int:
        return self.stage * self.world + self.rank

    @property
    def processes(self) -> int:
        return self.world * self.stages

    @property
    def peers(self) -> range:
        """The processes of its stage."""
        return range(self.stage * self.world, (self.stage + 1) * self.world)

    @property
    def before(self) -> int:
        """The process that gives it hidden states: of the stage before, or to the first stage of the last."""
        return (self.process - self.world) % self.processes

    @property
    def after(self) -> int:
        """The process that it gives hidden states to."""
        return (self.process + self.world) % self.processes

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def layers(self, count: int) -> range:
        """Those of so many layers that this rank has a part of. Earlier stages have fewer, by one at most.

        Raises ModelError if a stage would have none.
        """
        if count < self.stages:
            raise ModelError(f"{count} layers cannot be divided into {self.stages} stages: lower pipeline_parallel")
        return range(self.stage * count // self.stages, (self.stage + 1) * count // self.stages)

    def most_layers(self, count: int) -> int:
        """The layers of the stage that has most of so many."""
        return -(-count // self.stages)

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
