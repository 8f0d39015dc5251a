"""What is told of a load while it lasts."""

from typing import Final, Protocol


class LoadReport(Protocol):
    """Takes the signs of life of an engine that loads. A load that tells nothing new for long is given up."""

    def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
        """Note how much of the weights is read."""

    def waits(self, what: str) -> None:
        """Note that what comes next is not ours to hasten: "its turn to load onto cuda:0". Called again and again
        while there is reason to wait."""


class _Unreported:
    def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
        pass

    def waits(self, what: str) -> None:
        pass


UNREPORTED: Final[LoadReport] = _Unreported()
