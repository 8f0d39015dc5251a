"""No text has a bad word, whichever tokens spell it: compared with looking at every token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loraplex_engine.execution import token_bits
from loraplex_engine.execution.bad_words import TokenTexts

TOKENS = [*(bytes([byte]) for byte in b"abc\xc3\xa9 "), b"", b"ab", b"abc", b"bca", b"\xa9a", b"aaa", b"c a", b""]

short = st.text("abcé ", max_size=5).map(str.encode)
words = st.lists(short.filter(len), min_size=1, max_size=4)


def allowed(bad: list[bytes], token_ids: list[int]) -> list[int]:
    tokens = TokenTexts(TOKENS)
    octets = token_bits.first_tokens(len(TOKENS), len(TOKENS)).copy()
    found = tokens.without(bad)
    tail = b""
    for token in token_ids:
        tail = found.after(tail, [token])
    found.apply(octets, tail)
    return np.flatnonzero(token_bits.holds(octets, range(len(TOKENS)))).tolist()


@given(bad=words, drawn=st.lists(st.integers(0, len(TOKENS) - 1), max_size=6))
def test_a_token_is_allowed_if_no_word_ends_with_it(bad: list[bytes], drawn: list[int]) -> None:
    text = b"".join(TOKENS[token] for token in drawn)

    def completes(token: bytes, word: bytes) -> bool:
        after = text + token
        return after.find(word, max(len(text) - len(word) + 1, 0)) >= 0

    expected = [id_ for id_, token in enumerate(TOKENS) if not any(completes(token, word) for word in bad)]
    assert allowed(bad, drawn) == expected


def test_words_that_no_token_completes_cost_nothing_behind_a_text() -> None:
    tokens = TokenTexts(TOKENS)
    found = tokens.without([b"a" * 127 + bytes([byte]) for byte in range(1, 32)])  # no token begins so
    assert not found._cuts


def test_a_set_behind_a_text_is_made_once_for_all_rows_that_have_it() -> None:
    found = TokenTexts(TOKENS).without([b"ab", b"bb"])
    for _ in range(3):
        found.apply(np.full(8, 255, dtype=np.uint8)[: len(token_bits.first_tokens(len(TOKENS), len(TOKENS)))], b"a")
    assert found._allowed_behind.cache_info().misses == 1


@given(text=short)
def test_tokens_are_found_by_their_beginning_and_by_what_they_hold(text: bytes) -> None:
    tokens = TokenTexts(TOKENS)
    real = [(id_, token) for id_, token in enumerate(TOKENS) if token]
    assert sorted(tokens.beginning_with(text).tolist()) == [id_ for id_, token in real if token.startswith(text)]
    if text:
        assert tokens.holding(text).tolist() == [id_ for id_, token in real if text in token]
