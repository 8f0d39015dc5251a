"""A beam search, as a request asks for it. Torch-free."""

from enum import IntEnum

import msgspec


class EarlyStopping(IntEnum):
    """When a search with as many ended outputs as beams gives up the others. The values travel between processes."""

    HEURISTIC = 1  # when none could end better if it ended now
    ALWAYS = 2  # at once
    NEVER = 3  # when none could end better, however long it may become


class Beams(msgspec.Struct, array_like=True, frozen=True):
    """How to search, with the meaning that transformers gives these words."""

    width: int  # at least 2
    output_ids: list[int]  # of the request's outputs, the best first: its own id, and others that it alone has
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC

    def num_candidates(self, num_endings: int) -> int:
        """The best continuations to look at: so many that `width` go on, whichever of these tokens end others."""
        return max(2, 1 + num_endings) * self.width
