"""transformers' parser of messages, in bounded memory."""

from collections.abc import Mapping
from typing import Any

LOOKED_BACK = 1 << 12  # characters before a mark, which the expression that finds it may see


class PartParser:
    """Has a ResponseParser forget what it has read: at each mark that it finds, it copies all that it keeps."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def feed(self, text: str) -> list[Mapping[str, Any]]:
        events: list[Mapping[str, Any]] = []
        for start in range(0, len(text), LOOKED_BACK):
            events += self._parser.feed(text[start : start + LOOKED_BACK])
            self._forget()
        return events

    def finish(self) -> list[Mapping[str, Any]]:
        events: list[Mapping[str, Any]] = self._parser.finalize()[1]
        return events

    def _forget(self) -> None:
        parser = self._parser
        if parser._pos > 2 * LOOKED_BACK:  # never to the very beginning, which an expression may ask for
            parser._buffer, parser._pos = parser._buffer[parser._pos - LOOKED_BACK :], LOOKED_BACK
