"""Regular expressions and grammars, as Hypothesis thinks of them: what is drawn is of the form, and what is of the form
can be drawn.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraplex.v1.generation_pb2 import Constraint
from loraplex_service.requests.forms import checked_grammar
from tests.engine.forms import EOS, TOKENS
from tests.engine.masks import Masks

MOST_TOKENS = 24


@cache
def masks() -> Masks:
    return Masks(TOKENS, EOS)


# ---- regular expressions ---------------------------------------------------------------------------------------------

ATOMS = ["a", "b", "é", r"\d", r"\w", "[a-c]", "[^ab]", ".", r"\.", "(?:ab|c)", r"\x41", "[é-ü]"]


def repeated(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    times = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])
    return st.builds(lambda part, how: f"(?:{part}){how}", parts, times)


def joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    several = st.lists(parts, min_size=2, max_size=3)
    return several.map("".join) | several.map(lambda options: f"(?:{'|'.join(options)})")


patterns = st.recursive(st.sampled_from(ATOMS), lambda parts: repeated(parts) | joined(parts), max_leaves=6)
seeds = st.integers(0, 1 << 32)


@settings(deadline=None)
@given(pattern=patterns, seed=seeds)
def test_what_is_drawn_matches_its_regular_expression(pattern: str, seed: int) -> None:
    form = masks().form(checked_grammar(Constraint(regex=pattern)))
    text = masks().drawn(form, np.random.default_rng(seed), MOST_TOKENS)
    assume(text is not None)
    assert text is not None
    assert re.fullmatch(pattern, text.decode(), re.ASCII)


@settings(deadline=None)
@given(data=st.data(), pattern=patterns)
def test_what_matches_a_regular_expression_can_be_drawn(data: st.DataObject, pattern: str) -> None:
    text = data.draw(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True))
    assert masks().takes(masks().form(checked_grammar(Constraint(regex=pattern))), text.encode())


# ---- grammars --------------------------------------------------------------------------------------------------------

Rules = dict[str, list[list[str]]]  # alternatives by name; a part is a name of a rule, or a literal in quotes

NAMES = ["root", "x", "y"]
parts = st.builds(
    str.__add__, st.sampled_from([*NAMES, '"a"', '"b"', '"ab"', '"é"']), st.sampled_from(["", "", *"?*+"])
)
grammars = st.fixed_dictionaries(
    {name: st.lists(st.lists(parts, max_size=3), min_size=1, max_size=3) for name in NAMES}
)


def written(rules: Rules) -> str:
    empty = '""'
    ways = {name: " | ".join(" ".join(way) or empty for way in rules[name]) for name in rules}
    return "\n".join(f"{name} ::= {said}" for name, said in ways.items())


def has(rules: Rules, text: str) -> bool:
    """Whether the grammar has the text: the spans of each rule, until no more are found."""
    spans: dict[str, set[tuple[int, int]]] = {name: set() for name in rules}

    def ends(part: str, start: int) -> set[int]:
        if part[-1] in "?*+":
            once = ends(part[:-1], start)
            while part[-1] != "?" and (more := set().union(*(ends(part[:-1], at) for at in once)) - once):
                once |= more
            return once | ({start} if part[-1] != "+" else set())
        if part in rules:
            return {end for begin, end in spans[part] if begin == start}
        literal = part.strip('"')
        return {start + len(literal)} if text.startswith(literal, start) else set()

    grows = True
    while grows:
        grows = False
        for name, ways in rules.items():
            for start in range(len(text) + 1):
                for way in ways:
                    reached = {start}
                    for part in way:
                        reached = {end for at in reached for end in ends(part, at)}
                    new = {(start, end) for end in reached} - spans[name]
                    spans[name] |= new
                    grows = grows or bool(new)
    return (0, len(text)) in spans["root"]


def grammar_of(rules: Rules) -> str:
    try:
        return checked_grammar(Constraint(grammar=written(rules)))
    except ValueError:  # some rules have no end
        assume(False)
        raise


@settings(deadline=None)
@given(rules=grammars, seed=seeds)
def test_what_is_drawn_is_text_of_its_grammar(rules: Rules, seed: int) -> None:
    form = masks().form(grammar_of(rules))
    text = masks().drawn(form, np.random.default_rng(seed), MOST_TOKENS)
    assume(text is not None)
    assert text is not None
    assert has(rules, text.decode())


# A rule that leads back to no rule is a word, read as long as it goes, and so is a literal: what would have to end one
# sooner is not in the form (docs/forms.md). Here every word is one character, and every rule leads back to itself.
short_parts = st.builds(str.__add__, st.sampled_from([*NAMES, '"a"', '"b"', '"é"']), st.sampled_from(["", "", *"?*+"]))


def and_itself(ways: list[list[str]], name: str) -> list[list[str]]:
    return [*ways, [name]]


grammars_of_characters = st.fixed_dictionaries(
    {
        name: st.builds(and_itself, st.lists(st.lists(short_parts, max_size=3), min_size=1, max_size=3), st.just(name))
        for name in NAMES
    }
)


@settings(deadline=None)
@given(rules=grammars, text=st.text("abé", max_size=6))
def test_no_text_beyond_a_grammar_can_be_drawn(rules: Rules, text: str) -> None:
    assert has(rules, text) or not masks().takes(masks().form(grammar_of(rules)), text.encode())


@settings(deadline=None)
@given(rules=grammars_of_characters, text=st.text("abé", max_size=6))
def test_just_the_texts_of_a_grammar_can_be_drawn(rules: Rules, text: str) -> None:
    assert masks().takes(masks().form(grammar_of(rules)), text.encode()) == has(rules, text)
