"""Stop strings: the same answer as a naive search over the whole text, for any cut of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_service.text import StopResult, StopStrings, TextError

few_letters = st.text(alphabet="ab", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=5)


def naive(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first prefix that ends with a stop string ends, and the longest such string. The obvious way."""
    for end in range(1, len(text) + 1):
        if here := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(here, key=len)
    return None


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({place % (len(text) + 1) for place in cuts})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(text=few_letters, stops=stop_lists, cuts=st.lists(st.integers(0, 20), max_size=6), include=st.booleans())
def test_any_cut_gives_what_a_naive_search_gives(text, stops, cuts, include):
    search = StopStrings(stops, include_stop=include)
    results = [search.push(part) for part in cut(text, cuts)]
    emitted = "".join(result.text for result in results) + search.flush()
    found = naive(text, stops)
    if found is None:
        assert (emitted, {result.matched for result in results}) == (text, {None})
    else:
        end, stop = found
        assert emitted == (text[:end] if include else text[: end - len(stop)])
        assert results[-1].matched == stop
        assert sum(result.discarded for result in results) == len(text) - end


@given(text=few_letters, stops=stop_lists)
def test_nothing_is_held_back_that_could_not_begin_a_stop_string(text, stops):
    if naive(text, stops) is not None:
        return
    emitted = StopStrings(stops).push(text).text
    held = text[len(emitted) :]
    longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
    assert len(held) == longest


def test_no_stop_strings_let_everything_through():
    assert StopStrings([]).push("anything") == StopResult("anything")


def test_text_before_the_stop_comes_out_and_the_rest_is_counted():
    assert StopStrings(["END"]).push("one END two") == StopResult("one ", "END", discarded=4)


def test_the_stop_string_is_kept_where_asked():
    assert StopStrings(["END"], include_stop=True).push("one END two") == StopResult("one END", "END", discarded=4)


def test_a_beginning_that_leads_nowhere_comes_out_later():
    stops = StopStrings(["</s>"])
    assert [stops.push(part).text for part in ("a<", "/", "b")] == ["a", "", "</b"]


def test_the_first_to_be_complete_wins_over_the_first_to_begin():
    assert StopStrings(["abcd", "bc"]).push("xabcd") == StopResult("xa", "bc", discarded=1)


def test_of_two_that_end_together_the_longer_wins():
    assert StopStrings(["b", "ab"]).push("xab") == StopResult("x", "ab")


def test_after_a_match_all_is_discarded():
    stops = StopStrings(["."])
    stops.push("end.")
    assert stops.push("more.") == StopResult("", ".", discarded=5)
    assert stops.flush() == ""


def test_flush_gives_back_what_was_held():
    stops = StopStrings(["abc"])
    assert stops.push("xab").text == "x"
    assert stops.flush() == "ab"


def test_empty_stop_string_is_refused():
    with pytest.raises(TextError, match="stop string 1 is empty"):
        StopStrings(["a", ""])
