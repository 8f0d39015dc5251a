"""The tokens that a sequence has, each once, counted as they come: to count them all at each step takes longer the more
there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TypeAlias

WORDS = "q"  # of 64 bits

# The tokens of a prompt and its output, each once, in any order; and how often the output has each.
Counted: TypeAlias = "tuple[array[int], array[int]]"


class TokenCounts:
    """The counts of one sequence. What was added last is taken away first."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._token_ids = array(WORDS, dict.fromkeys(prompt))
        self._in_output = array(WORDS, bytes(8 * len(self._token_ids)))
        self._places = {token: place for place, token in enumerate(self._token_ids)}
        self._num_of_prompt = len(self._places)
        self._output: list[int] = []

    def follow(self, output: list[int]) -> None:
        """Count this output, which mostly is the one of before and some tokens more."""
        while self._output != output[: len(self._output)]:
            self._take_away()
        self._add(output[len(self._output) :])

    def behind_each(self, drafts: Sequence[int]) -> list[Counted]:
        """The counts as they are, and as they would be behind each of these tokens."""
        found = [self._copied()]
        for draft in drafts:
            self._add((draft,))
            found.append(self._copied())
        for _ in drafts:
            self._take_away()
        return found

    def _copied(self) -> Counted:
        return self._token_ids[:], self._in_output[:]

    def _add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._token_ids):
                self._token_ids.append(token)
                self._in_output.append(0)
            self._in_output[place] += 1
            self._output.append(token)

    def _take_away(self) -> None:
        token = self._output.pop()
        place = self._places[token]
        self._in_output[place] -= 1
        if place >= self._num_of_prompt and not self._in_output[place]:  # it came last, so its place is the last
            del self._places[token], self._token_ids[place], self._in_output[place]
