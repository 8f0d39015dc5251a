"""Words that an output must not have, whichever tokens spell them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from loraplex_engine.execution import token_bits


class TokenTexts:
    """The tokens of a vocabulary, to be found by the bytes that they add to a text."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """`token_bytes`: by id; empty: the token adds none."""
        self.token_bytes = token_bytes
        ordered = sorted((text, token) for token, text in enumerate(token_bytes) if text)
        self._texts = [text for text, _ in ordered]
        self._ids = np.array([token for _, token in ordered], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(self._texts), dtype=np.uint8)  # of all, in this order
        self._ends = np.cumsum([len(text) for text in self._texts])

    def beginning_with(self, start: bytes) -> np.ndarray:
        """The tokens whose text begins so: int64 [n]"""
        first = bisect_left(self._texts, start)
        end = bisect_right(self._texts, start, lo=first, key=lambda text: text[: len(start)])
        found: np.ndarray = self._ids[first:end]
        return found

    def without(self, words: Sequence[bytes]) -> BadWords:
        """What texts without these words need, of which none is empty. Takes some milliseconds a word."""
        return BadWords(words, self)

    def holding(self, word: bytes) -> np.ndarray:
        """The tokens with this word somewhere in their text: int64 [n]"""
        places = np.arange(max(len(self._bytes) - len(word) + 1, 0))
        for offset, byte in enumerate(word):
            places = places[self._bytes[places + offset] == byte]
        owners = np.searchsorted(self._ends, places, side="right")
        found: np.ndarray = np.unique(self._ids[owners[places + len(word) <= self._ends[owners]]])
        return found


class BadWords:
    """Says which tokens complete none of some words. Of the text before them only its last bytes matter."""

    def __init__(self, words: Sequence[bytes], tokens: TokenTexts) -> None:
        self._words = sorted(words)
        self._tokens = tokens
        self._num_kept = max(map(len, words)) - 1
        vocab_size = len(tokens.token_bytes)
        self._allowed = token_bits.first_tokens(vocab_size, vocab_size).copy()  # by the words within a token
        for word in words:
            token_bits.remove(self._allowed, tokens.holding(word))

    def after(self, tail: bytes, token_ids: Sequence[int]) -> bytes:
        """What matters of a text after these tokens. tail: what mattered of it before them; empty: it was empty."""
        text = tail + b"".join(map(self._tokens.token_bytes.__getitem__, token_ids))
        return text[max(len(text) - self._num_kept, 0) :]

    def apply(self, octets: np.ndarray, tail: bytes) -> None:
        """Take what would complete a word behind a text out of a set of tokens. octets: as in `token_bits`, uint8"""
        octets &= self._allowed
        for start in range(len(tail)):
            begun = tail[start:]
            for word in self._words[bisect_left(self._words, begun) :]:
                if not word.startswith(begun):
                    break
                if len(word) > len(begun):
                    token_bits.remove(octets, self._tokens.beginning_with(word[len(begun) :]))
