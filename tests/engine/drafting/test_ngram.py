"""Prompt lookup: what followed the same tokens before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_engine.drafting.ngram import LEAST_TOKENS, SIZES, NgramIndex


def last_occurrence(tokens: Sequence[int], size: int) -> int | None:
    """Where the last `size` tokens ended when they last occurred before."""
    ends = range(len(tokens) - 1, size - 1, -1)
    return next((end for end in ends if tokens[end - size : end] == tokens[-size:]), None)


def test_what_followed_the_last_tokens_may_follow_them_again() -> None:
    assert NgramIndex().continuation([1, 2, 3, 4, 5, 6, 7, 9, 1, 2], 3) == [3, 4, 5]


def test_the_latest_of_several_places_counts() -> None:
    assert NgramIndex().continuation([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]


def test_a_long_match_counts_more_than_a_later_short_one() -> None:
    assert NgramIndex().continuation([1, 2, 3, 4, 5, 9, 3, 4, 6, 9, 1, 2, 3, 4], 1) == [5]


def test_a_period_is_repeated_beyond_the_last_token() -> None:
    assert NgramIndex().continuation([8, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_tokens_that_never_occurred_have_no_continuation(tokens: list[int]) -> None:
    assert NgramIndex().continuation(tokens, 4) == []


@given(st.lists(st.integers(0, 3), max_size=400), st.lists(st.integers(1, 9)), st.integers(1, 8))
def test_an_index_that_grows_finds_what_one_of_all_tokens_finds(
    tokens: list[int], steps: list[int], count: int
) -> None:
    growing, known = NgramIndex(), 0
    for step in [*steps, len(tokens)]:
        known = min(known + step, len(tokens))
        assert growing.continuation(tokens[:known], count) == NgramIndex().continuation(tokens[:known], count)


@given(st.lists(st.integers(0, 60), max_size=LEAST_TOKENS), st.integers(1, 8))
def test_what_is_found_is_what_followed(tokens: list[int], count: int) -> None:
    found = NgramIndex().continuation(tokens, count)
    places = [place for size in SIZES if (place := last_occurrence(tokens, size)) is not None]
    whole = [*tokens, *found]
    assert not found or any(whole[place : place + count] == found for place in places)


def test_a_long_prompt_takes_a_bounded_table() -> None:
    index = NgramIndex()
    index.continuation([place * 7 % 32000 for place in range(100_000)], 1)
    assert sum(places.nbytes for places in index._places.values()) <= 32 * 100_000
