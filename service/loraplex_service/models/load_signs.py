"""The signs of life of an engine that loads: it has no step loop yet that could answer a ping."""

import asyncio
from typing import Final

SLICES: Final = 10  # of a timeout: a service that was itself suspended loses one of them, and kills no healthy engine


class LoadSigns:
    """What one life of an engine has told of its load, and for how long it has told nothing new."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.state = "its process was starting"  # by the last news
        self.is_asking = False  # it waits for an answer of this service
        self._num_silent = 0

    def note(self, state: str) -> None:
        """Note news."""
        self.state = state
        self._num_silent = 0

    def is_silent(self) -> bool:
        """Count a slice of the timeout. Returns whether no news came for all of them, after the one with the last."""
        self._num_silent = 0 if self.is_asking else self._num_silent + 1
        return self._num_silent > SLICES
