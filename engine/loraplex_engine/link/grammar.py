"""Grammars, which say what form an output must have: how they are written, and within which limits.

They are texts of llguidance (Lark with its additions), which compiles them and says for each state which tokens may
follow.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

UNUSABLE_FORM = "INVALID_PARAMETER"  # the reason of an error that lies in a request's form

# The library counts work, not time. A grammar at these limits is read in about half a second. A row's mask, and taking
# its token, take 4 ms each at most where each token may be said in many ways, and the mask 15 ms where regular
# expressions are hard; what needs more ends with an error.
GRAMMAR_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=100_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=500,  # the parses that are open at a time: at the library's 2000 a token took 30 to 60 ms
    max_lexer_states=50_000,  # of 1 to 2 kB
    verbose_errors=False,  # or they hold what was written
)

# Where only one text can follow, any of its tokens may: the engine has no tokenizer to say which is the usual one.
_HEADER = '%llguidance {"no_forcing": true}\n'

# Between the parts of a JSON value: a blank, or a new line with any indentation. A model that is not sure writes one
# blank line after the other where it may.
_WHITESPACE = {"whitespace_pattern": r"\x20?|\x0D?\x0A[\x20\x09]{0,40}"}


def grammar_problem(grammar: str) -> str:
    """Why a grammar cannot be compiled, or "". Takes up to a second, and leaves the interpreter to other threads."""
    return LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), limits=GRAMMAR_LIMITS)


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON values that a JSON Schema accepts. Raises ValueError for NaN and infinite numbers."""
    return f"{_HEADER}start: {_json_rule(schema)}\n"


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _WHITESPACE}, allow_nan=False)


def literal(text: str, control_tokens: Mapping[str, int]) -> str:
    """The expression of a text. What is a control token in it is that token, which has no text in grammars."""
    ids = {token: f"<[{token_id}]>" for token, token_id in control_tokens.items() if token in text}
    if not ids:
        return json.dumps(text, ensure_ascii=False) if text else ""
    parts = re.split("(" + "|".join(re.escape(token) for token in sorted(ids, key=len, reverse=True)) + ")", text)
    return " ".join(ids.get(part) or json.dumps(part, ensure_ascii=False) for part in parts if part)


def thought_rules(end: str, control_tokens: Mapping[str, int]) -> str:
    """The rules of "thought": any text up to its end, and two new lines at most behind that."""
    gap = r"/\n{0,2}/"
    if any(end.startswith(token) for token in control_tokens):
        return f"thought: /(?s:.*)/ {literal(end, control_tokens)} {gap}\n"
    return f"thought: text_of_thought {gap}\ntext_of_thought[suffix={json.dumps(end)}]: /(?s:.*)/\n"


def behind_thought(grammar: str, before: str, rules: str) -> str:
    """A grammar behind what a model thinks first. before: an expression, whose `rules` are those of `thought_rules`."""
    form = grammar.removeprefix(_HEADER)
    return f"{_HEADER}start: {before} form\nform: %lark {{\n{form}}}\n{rules}"


def calls_grammar(
    begin: str, calls: Sequence[tuple[str, Mapping[str, Any], str]], between: str | None, end: str
) -> str:
    """The grammar of calls of tools: each is a head, arguments that a JSON Schema accepts, and a tail.

    All texts are expressions. `between` calls: None if there is one call alone. Raises ValueError as `schema_grammar`.
    """
    more = "" if between is None else f"({between} call)*"
    lines = [
        f"start: {begin} call {more} {end}",
        "call: " + " | ".join(f"call{number}" for number in range(len(calls))),
    ]
    for number, (head, schema, tail) in enumerate(calls):
        lines.append(f"call{number}: {head} arguments{number} {tail}")
        lines.append(f"arguments{number}: {_json_rule(schema)}")
    return _HEADER + "\n".join(lines) + "\n"


def regex_grammar(pattern: str) -> str:
    """The grammar of the texts that a regular expression matches as a whole: the syntax of Rust, \\d and \\w in ASCII.

    Raises ValueError for one that ends in the middle of an escape.
    """
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ValueError("it ends with a backslash that escapes nothing")
    return f"{_HEADER}start: /{regex_to_lark(pattern, use_ascii='dw')}/\n"


def choice_grammar(choices: Iterable[str]) -> str:
    """The grammar of these texts."""
    spelled = ("".join(rf"\x{{{ord(character):x}}}" for character in choice) for choice in choices)
    return f"{_HEADER}start: /{'|'.join(spelled)}/\n"


def gbnf_grammar(text: str) -> str:
    """The grammar that a text in GBNF says. Raises ValueError that says where it is wrong."""
    try:
        rules = gbnf_to_lark(text).partition("\n")[2]  # behind a header without options
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # of which the library has several
        raise ValueError(str(error)) from error
    return _HEADER + rules
