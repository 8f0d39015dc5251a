"""What tokens are drawn by, as arrays: what is changed in logits, how each row is drawn, and by which number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

NO_VALUES = np.array([], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Token ids of some rows, one row's after the other's."""

    rows: np.ndarray  # int64 [n], ascending
    starts: np.ndarray  # int64 [n+1]: token_ids[starts[i] : starts[i+1]] are of rows[i]
    token_ids: np.ndarray  # int64 [starts[n]]

    @classmethod
    def of(cls, rows: Sequence[int], lists: Sequence[Sequence[int] | np.ndarray]) -> RowTokens | None:
        """The list of each of these rows; None: there are no rows."""
        if not rows:
            return None
        token_ids = np.concatenate([np.asarray(each, dtype=np.int64) for each in lists])
        return cls(np.array(rows), np.cumsum([0, *map(len, lists)]), token_ids)

    @property
    def row_of_each(self) -> np.ndarray:
        """The row of each token id: int64 [starts[n]]."""
        return np.repeat(self.rows, np.diff(self.starts))


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of some rows for the tokens that they have had."""

    tokens: RowTokens  # of each row those of prompt and output, each once
    counts: np.ndarray  # int64, one for each token id of `tokens`: how often the output has it
    repetition: np.ndarray  # float64 [n]; 1: none
    presence: np.ndarray  # float64 [n]; 0: none
    frequency: np.ndarray  # float64 [n]; 0: none


@dataclass(frozen=True, slots=True)
class Watermarks:
    """The green tokens of some rows: with a row's seed s those v for which mix(s + (v + 1) · c) / 2^64 < gamma.

    mix is SplitMix64's finaliser and c its constant, modulo 2^64; the 53 highest bits of the result count.
    """

    rows: np.ndarray  # int64 [n]
    seeds: np.ndarray  # uint64 [n]
    gammas: np.ndarray  # float64 [n]
    deltas: np.ndarray  # float32 [n]: added to their logits

    @property
    def limits(self) -> np.ndarray:
        """The gammas, as what the 53 bits are below: int64 [n]"""
        return (self.gammas * (1 << 53)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """What is changed in the logits of each row before its token is drawn. None: in no row."""

    limits: np.ndarray  # int64 [S]: ids from here on have no token
    penalties: Penalties | None = None
    bias: RowTokens | None = None  # of each row different tokens
    bias_values: np.ndarray = field(default_factory=lambda: NO_VALUES)  # float32, one for each token id of `bias`
    allowed: RowTokens | None = None  # rows that may draw these alone
    forbidden: RowTokens | None = None
    watermarks: Watermarks | None = None


@dataclass(frozen=True)
class Draws:
    """How each row's token is drawn from its logits."""

    temperatures: np.ndarray  # float64 [S]; 0: the most likely token, whatever the rest says
    top_k: np.ndarray  # int64 [S]; 0: all
    top_p: np.ndarray  # float64 [S]; 1: all
    min_p: np.ndarray  # float64 [S]; 0: all
    typical_p: np.ndarray  # float64 [S]; 1: all
    seeds: np.ndarray  # uint64 [S]
    positions: np.ndarray  # int64 [S]: of the token in its sequence

    @classmethod
    @lru_cache
    def greedy(cls, num_rows: int) -> Draws:
        """The most likely token of each row. Kept: most steps are so, and each column made anew costs a cold cache."""
        none = np.zeros(num_rows, dtype=np.int64)
        nothing, all_of_it = none.astype(np.float64), np.ones(num_rows)
        return cls(nothing, none, all_of_it, nothing, all_of_it, none.astype(np.uint64), none)

    def of(self, rows: np.ndarray) -> Draws:
        """Those of some rows."""
        columns = self.temperatures, self.top_k, self.top_p, self.min_p, self.typical_p, self.seeds, self.positions
        return Draws(*(column[rows] for column in columns))

    @property
    def cuts(self) -> np.ndarray:
        """Whether each row's token is drawn from a part of the row: bool [S]"""
        cut = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0) | (self.typical_p < 1)
        found: np.ndarray = cut & (self.temperatures > 0)
        return found

    @cached_property
    def columns(self) -> tuple[np.ndarray, ...]:
        """What compiled functions are given of each row: all but seeds and positions, which are one number there."""
        counts, *others = self.top_k, self.temperatures, self.top_p, self.min_p, self.typical_p
        temperatures, *cuts = (each.astype(np.float64, copy=False) for each in others)
        return temperatures, counts.astype(np.int64, copy=False), *cuts, self.numbers

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where `columns` lie."""
        return tuple(column.ctypes.data for column in self.columns)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The random number of each row."""
        return uniform(self.seeds, self.positions)


class Likelihoods(NamedTuple):
    """How likely some tokens of each row are, and which are the most likely ones, in natural logarithms."""

    logprobs: Tensor  # float32 [S, N]
    ranks: Tensor  # int64 [S], of the first of them; 1: the most likely
    top_ids: Tensor  # int64 [S, k]
    top_logprobs: Tensor  # float32 [S, k]


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """For each seed and position a number in [0, 1) that depends on them alone: uint64 [S], int64 [S] → float64 [S]

    Two rounds of SplitMix64's finaliser. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators".
    """
    state = seeds * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    state += np.uint64(0x632BE59BD9B4E019)
    for _ in range(2):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    numbers: np.ndarray = (state >> np.uint64(11)) / float(1 << 53)
    return numbers
