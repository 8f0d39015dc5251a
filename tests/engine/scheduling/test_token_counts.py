"""Tokens that are counted as they come are counted as all together would be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loraplex_engine.scheduling.token_counts import Counted, TokenCounts

TOKENS = st.lists(st.integers(0, 6), max_size=9)


def counted(counts: Counted) -> dict[int, int]:
    token_ids, in_output = (column.tolist() for column in counts)
    assert len(set(token_ids)) == len(token_ids)
    return dict(zip(token_ids, in_output, strict=True))


def expected(prompt: Sequence[int], output: Sequence[int]) -> dict[int, int]:
    return dict.fromkeys(prompt, 0) | Counter(output)


@given(prompt=TOKENS, outputs=st.lists(TOKENS, max_size=5), drafts=TOKENS)
def test_counts_follow_an_output_wherever_it_goes(
    prompt: list[int], outputs: list[list[int]], drafts: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for output in outputs:
        counts.follow(output)
        found = counts.behind_each(drafts)
        wanted = [expected(prompt, [*output, *drafts[:number]]) for number in range(len(drafts) + 1)]
        assert list(map(counted, found)) == wanted


def test_counts_that_were_given_out_stay_as_they_are() -> None:
    counts = TokenCounts([5])
    counts.follow([7])
    [before] = counts.behind_each([])
    counts.follow([7, 7, 5])
    assert counted(before) == {5: 0, 7: 1}


def test_there_is_room_for_any_number_of_tokens() -> None:
    counts = TokenCounts([])
    counts.follow(list(range(1000)))
    [found] = counts.behind_each([])
    assert counted(found) == dict.fromkeys(range(1000), 1)
