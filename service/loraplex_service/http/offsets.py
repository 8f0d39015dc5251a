"""Where in a text its tokens begin."""

import codecs
from collections.abc import Iterable, Iterator

from loraplex.v1.inference_pb2 import TokenLogprob


class TextOffsets:
    """The offsets of the tokens of one text, which may come in parts, each with its tokens.

    A token that adds nothing to the text, such as a special one that is not shown, has the offset of what follows, and
    so have those that share a character. What comes next is found by the text, since that alone says what is shown.
    """

    def __init__(self) -> None:
        self._before = 0  # characters of earlier parts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, text: str, tokens: Iterable[TokenLogprob]) -> list[int]:
        """The offset of each token of the next part of the text."""
        offsets = list(self._places(text, tokens))
        self._before += len(text)
        return offsets

    def _places(self, text: str, tokens: Iterable[TokenLogprob]) -> Iterator[int]:
        place = 0
        for token in tokens:
            yield self._before + place
            added = self._decoder.decode(token.bytes)
            if not text.startswith(added, place):
                added = added.removeprefix(" ")  # which some tokenizers leave out where a text begins
            if text.startswith(added, place):
                place += len(added)
