"""Words that an output must not have, whichever tokens spell them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

from loraplex_engine.execution import token_bits

KEPT = 64  # sets of tokens, by what is before them: rows of one request often have the same


class TokenTexts:
    """The tokens of a vocabulary, to be found by the bytes that they add to a text."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """`token_bytes`: by id; empty: the token adds none."""
        self.token_bytes = token_bytes
        ordered = sorted((text, token) for token, text in enumerate(token_bytes) if text)
        self._texts = [text for text, _ in ordered]
        self.longest = max(map(len, self._texts), default=0)  # bytes
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
        self._tokens = tokens
        self._num_kept = max(map(len, words)) - 1
        vocab_size = len(tokens.token_bytes)
        allowed = token_bits.first_tokens(vocab_size, vocab_size).copy()  # by the words within a token
        for word in words:
            token_bits.remove(allowed, tokens.holding(word))
        # Where a word may be cut so that one token completes it, and those tokens, by what they begin with.
        cuts = {(word[:place], word[place:]) for word in words for place in range(1, len(word))}
        endings = {ending for _, ending in cuts if len(ending) <= tokens.longest}
        self._completing = {ending: found for ending in endings if len(found := tokens.beginning_with(ending))}
        self._cuts = [cut for cut in cuts if cut[1] in self._completing]
        self._allowed_behind = lru_cache(KEPT)(partial(self._without_completing, allowed))

    def after(self, tail: bytes, token_ids: Sequence[int]) -> bytes:
        """What matters of a text after these tokens. tail: what mattered of it before them; empty: it was empty."""
        text = tail + b"".join(map(self._tokens.token_bytes.__getitem__, token_ids))
        return text[max(len(text) - self._num_kept, 0) :]

    def apply(self, octets: np.ndarray, tail: bytes) -> None:
        """Take what would complete a word behind a text out of a set of tokens. octets: as in `token_bits`, uint8"""
        octets &= self._allowed_behind(tail)

    def _without_completing(self, allowed: np.ndarray, tail: bytes) -> np.ndarray:
        left = allowed.copy()
        for ending in {ending for begun, ending in self._cuts if tail.endswith(begun)}:
            token_bits.remove(left, self._completing[ending])
        return left
