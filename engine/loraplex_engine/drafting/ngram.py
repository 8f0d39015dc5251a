"""Prompt lookup: what followed the latest tokens when they last occurred in the prompt or the output.

Source: prompt lookup decoding (Saxena, 2023); the table is that of LZ77 compressors: the last place of each hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIZES = (4, 2)  # tokens that must have occurred before, in this order of trust
LEAST_TOKENS = 128
FACTOR = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring ids end up far apart
WORD = (1 << 64) - 1
NOWHERE = 0


class NgramIndex:
    """Where each run of tokens in one sequence ended last. Takes at most 32 bytes a token, and microseconds a step."""

    def __init__(self) -> None:
        self._num_bits = 0
        self._places: dict[int, np.ndarray] = {}  # by size: int32 [2^bits], where a run with this hash ends
        self._num_seen = 0  # runs that end before here are in it

    def continuation(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow. `token_ids`: those of the last call, and more behind them."""
        self._take(token_ids)
        for size in SIZES:
            place = self._last_place(token_ids, size)
            if place != NOWHERE:
                return _copied(token_ids, place, count)
        return []

    def _last_place(self, token_ids: Sequence[int], size: int) -> int:
        """The end of the last run before this one that has the sequence's last `size` tokens."""
        if len(token_ids) <= size:
            return NOWHERE
        run = token_ids[-size:]
        place = int(self._places[size][_hash(run) >> (64 - self._num_bits)])
        return place if token_ids[place - size : place] == run else NOWHERE

    def _take(self, token_ids: Sequence[int]) -> None:
        """Add the runs that end before the last token."""
        if not self._places or len(token_ids) >> self._num_bits:
            self._build(token_ids)
        for end in range(self._num_seen, len(token_ids)):
            for size, places in self._places.items():
                if end >= size:
                    places[_hash(token_ids[end - size : end]) >> (64 - self._num_bits)] = end
        self._num_seen = len(token_ids)

    def _build(self, token_ids: Sequence[int]) -> None:
        """Make tables with room for twice these tokens, or more."""
        self._num_bits = (2 * max(LEAST_TOKENS, len(token_ids))).bit_length()
        tokens = np.array(token_ids, dtype=np.int64).astype(np.uint64)
        for size in SIZES:
            places = self._places[size] = np.full(1 << self._num_bits, NOWHERE, dtype=np.int32)
            ends = np.arange(size, len(tokens))
            hashes = np.zeros(len(ends), dtype=np.uint64)
            for offset in range(size):
                hashes = (hashes + tokens[offset : offset + len(ends)] + np.uint64(1)) * np.uint64(FACTOR)
            places[hashes >> np.uint64(64 - self._num_bits)] = ends  # of equal hashes, the last one stays
        self._num_seen = len(token_ids)


def _hash(run: Sequence[int]) -> int:
    value = 0
    for token in run:
        value = (value + token + 1) * FACTOR & WORD
    return value


def _copied(token_ids: Sequence[int], place: int, count: int) -> list[int]:
    """The tokens from `place` on. Those that repeat a period up to the end go on repeating it."""
    known = token_ids[place : place + count]
    return [known[index % len(known)] for index in range(count)] if len(known) < count else list(known)
