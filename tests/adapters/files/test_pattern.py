import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_adapters.files.pattern import MAX_PATTERN_LENGTH, ModulePattern

NAME = "model.layers.11.self_attn.q_proj"


def peft_rule(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("proj", False),  # a tail begins after a dot
        ("self_attn.q_proj", True),
        ("^q_proj", False),
        ("^model.layers.11.self_attn.q_proj", True),
        (r".*layers\.(1|11)\..*", True),
        (r"layers\.1\..*", False),
        (r"layers\.\d{2}\.self_attn\.[qv]_proj", True),
        (r"model\.layers\.\d+?\.(?:self_attn\.)?q_proj$", True),
        ("q_proj|v_proj", True),
        ("", False),
    ],
)
def test_a_pattern_matches_the_whole_path_or_a_tail(pattern: str, matches: bool) -> None:
    assert ModulePattern(pattern).matches(NAME) is matches
    assert peft_rule(pattern, NAME) is matches


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c.]", "^", "$", "1"])
QUANTIFIERS = st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}"])


def groups(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    piece = st.one_of(
        st.tuples(ATOMS.filter(lambda atom: atom not in "^$"), QUANTIFIERS).map("".join),
        st.tuples(inner, QUANTIFIERS).map(lambda parts: f"({parts[0]}){parts[1]}"),
        ATOMS,
    )
    sequence = st.lists(piece, max_size=3).map("".join)
    return st.lists(sequence, min_size=1, max_size=2).map("|".join)


@given(st.recursive(ATOMS, groups, max_leaves=8), st.text("ab1.", max_size=7))
def test_a_pattern_means_what_re_says(pattern: str, module: str) -> None:
    assert ModulePattern(pattern).matches(module) is peft_rule(pattern, module)


@given(st.recursive(ATOMS, groups, max_leaves=8), st.text("ab1.", max_size=7))
def test_a_pattern_matches_from_the_beginning_as_re_does(pattern: str, module: str) -> None:
    assert ModulePattern(pattern).match(module) is (re.match(pattern, module) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "((a*)*)*b",
        "(.|.)" * 150 + "b",
        "a?" * 200 + "a" * 200 + "b",
        ".*" * 400 + "b",
        "((((a{64}){64}){64}){64})",
        "((((){64}){64}){64}){64}b",
    ],
)
def test_a_hostile_pattern_is_matched_without_backtracking(pattern: str) -> None:
    assert not ModulePattern(pattern).matches("a" * 500)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("a)(b", "cannot read it"),
        ("(?=a)a", "is not supported"),
        ("(?i)a", "not a regular expression"),
        ("(?P<x>a)", "is not supported"),
        (r"(a)\1", "is not supported"),
        (r"\ba", "is not supported"),
        ("a++", "possessive"),
        ("[[a]", "set operation"),
        ("[a&&b]", "set operation"),
        ("[^a--b]", "set operation"),
        ("a{1000}", "above 64"),
        ("(" * 9 + ")" * 9, "inside each other"),
        ("a" * (MAX_PATTERN_LENGTH + 1), "at most"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModulePattern(pattern)


@given(st.text("[]^-&|~\\ab", max_size=12))
def test_whatever_the_brackets_re_has_nothing_to_warn_of(pattern: str) -> None:
    try:
        module_pattern = ModulePattern(pattern)  # a warning is an error here
    except ValueError:
        return
    assert module_pattern.matches("a-b") is peft_rule(pattern, "a-b")
