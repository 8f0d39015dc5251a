"""Grammars are written so that what a caller says stays what it is, and none takes long to read."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from loraplex_engine.link.grammar import (
    behind_thought,
    choice_grammar,
    gbnf_grammar,
    grammar_problem,
    regex_grammar,
    schema_grammar,
    thought_rules,
)
from tests.engine.masks import Masks

EOS, TOKENS = 256, [*(bytes([byte]) for byte in range(256)), b"", b"</", b"think>"]

ODD = ['a"b\\c/\n\t\u0001\u007fé😀', "{}[]()*+?.|^$", "%json", "</s>", "a/b", "\\"]


@pytest.mark.parametrize("text", ODD)
def test_any_text_can_be_a_choice_and_a_part_of_a_schema(text: str) -> None:
    assert grammar_problem(choice_grammar([text, "other"])) == ""
    assert grammar_problem(schema_grammar({"type": "object", "properties": {text: {"const": text}}})) == ""


@pytest.mark.parametrize(
    "pattern", ["a/b", "a/\nother: /b", r"a\/b", "a\nb", r"\d+", "(?i)yes|no", "^a$", r"\p{Greek}"]
)
def test_a_regular_expression_stays_one(pattern: str) -> None:
    assert grammar_problem(regex_grammar(pattern)) == ""


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (lambda: regex_grammar("(?=a)b"), "look-around"),
        (lambda: regex_grammar("a\\\\\\"), "escapes nothing"),
        (lambda: schema_grammar({"not": {}}), '["not"]'),
        (lambda: schema_grammar({"$ref": "http://localhost/x"}), "not present"),
        (lambda: schema_grammar({"$ref": "file:///etc/passwd"}), "not present"),
        (lambda: gbnf_grammar('start ::= "a"'), "root"),
        (lambda: gbnf_grammar('root ::= "a'), "end of input"),
        (lambda: gbnf_grammar('root ::= "a" %json {}'), ""),
        (lambda: gbnf_grammar("root ::= " + "(" * 20_000), "deeply"),
    ],
)
def test_what_is_no_grammar_is_found(grammar: Callable[[], str], problem: str) -> None:
    try:
        found = grammar_problem(grammar())
    except ValueError as error:
        found = str(error)
    assert found
    assert problem in found


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


DOUBLING = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}
HOSTILE: dict[str, Callable[[], str]] = {
    "recursive": lambda: schema_grammar({"$ref": "#"}),
    "doubling": lambda: schema_grammar({"$ref": "#/$defs/a0", "$defs": DOUBLING | {"a30": {}}}),
    "nested": lambda: schema_grammar(nested(60)),
    "products": lambda: schema_grammar(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{k}": {}}} for k in range(3)]} for i in range(20)]}
    ),
    "long": lambda: schema_grammar({"properties": {f"v{i}": {} for i in range(4000)}}),
    "words": lambda: schema_grammar({"enum": [f"v{i}" for i in range(6000)]}),
    "lengths": lambda: schema_grammar({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "repeated": lambda: regex_grammar("((a{1,1000}b){1,1000}c){1,1000}"),
    "parentheses": lambda: regex_grammar("(" * 2000 + ")" * 2000),
    "backtracking": lambda: regex_grammar("(a+)+$"),
    "ambiguous": lambda: gbnf_grammar('root ::= root root | "a" | ""'),
    "counted": lambda: gbnf_grammar('root ::= x{1000000}\nx ::= root{1000000} "b"'),
    "choices": lambda: choice_grammar([f"{i}" * 80 for i in range(256)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_made_to_hurt_is_read_or_refused(name: str) -> None:
    grammar_problem(HOSTILE[name]())  # it comes back: the library counts its work


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        schema_grammar({"const": json.loads("NaN")})


TEXTS = {
    "gbnf": (gbnf_grammar('root ::= "(" root ")" | "start: {}"'), "(start: {})"),
    "schema": (schema_grammar({"type": "object"}), '{"}": 1}'),
    "regex": (regex_grammar("[a-z}]+"), "a}"),
    "choices": (choice_grammar(["a", "b\n"]), "b\n"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_form_may_come_behind_a_thought(kind: str, is_open: bool) -> None:
    grammar, text = TEXTS[kind]
    masks = Masks(TOKENS, EOS)
    before = "thought" if is_open else '("<think>" thought)?'
    form = masks.form(behind_thought(grammar, before, thought_rules("</think>", {})))
    begun = "" if is_open else "<think>"
    assert masks.takes(form, f"{begun}Hm, {text} {{}}</think>{text}".encode())
    assert masks.takes(form, f"{begun}</think>\n\n{text}".encode())
    assert masks.takes(form, text.encode()) is not is_open
    assert not masks.takes(form, f"{begun}Hm</think>".encode())
    assert not masks.takes(form, f"{begun}Hm</think>{text}!".encode())
