"""The form that a request asks for, as the grammar that its engine compiles."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from llguidance.gbnf_to_lark import GrammarParser

from loraplex.v1.generation_pb2 import Constraint
from loraplex_engine.link.grammar import (
    choice_grammar,
    gbnf_grammar,
    grammar_problem,
    regex_grammar,
    schema_grammar,
)
from loraplex_service.admission.tenants import Tenant
from loraplex_service.errors import InvalidRequest
from loraplex_service.requests.endless import Way, endless, grammar_ways, schema_ways
from loraplex_service.requests.prompts import TextWork
from loraplex_service.telemetry.series import Counter

MOST_TRIED, MOST_TRIED_CHARS = 64, 4096  # schemas inside one, each by itself, to say where a problem is
MAX_NESTING = 64  # of a JSON Schema, in objects and lists
MAX_OPTIONAL = 100  # properties of an object; from some 120 on engines have too many ways on at once
MAX_RULES = 1000  # of a grammar in GBNF
MAX_KEPT = 128  # constraints that were found good
WORK_FACTOR = 16  # reading a grammar takes about as long as tokenising so many times its bytes

# What holds schemas by names of its own, and what holds values.
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_VALUES = frozenset(("enum", "const", "default", "examples"))


class Forms:
    """Reads constraints, and refuses those that no engine can compile. The latest good ones are kept."""

    def __init__(self, work: TextWork, checks: Counter | None = None) -> None:
        """`checks`: counts what is read, kept from before, and refused."""
        self._work = work
        self._checks = checks or Counter()
        self._kept: OrderedDict[bytes, str] = OrderedDict()

    async def grammar(self, constraint: Constraint, tenant: Tenant, path: str) -> str:
        """The grammar of a constraint that is in its limits; "": any text.

        `path`: where the constraint is in the request. Raises InvalidRequest, Unavailable.
        """
        kind = constraint.WhichOneof("kind")
        if kind is None or constraint.HasField("any_text"):
            return ""
        key = constraint.SerializeToString(deterministic=True)
        try:
            return await self.kept(key, tenant, lambda: checked_grammar(constraint))
        except ValueError as error:
            raise InvalidRequest.at(f"{path}.{kind}", f"cannot be used: {error}") from error

    async def kept(self, key: bytes, tenant: Tenant, make: Callable[[], str]) -> str:
        """The grammar that `make` makes of what the key says. Raises what it raises, and Unavailable."""
        self._checks.add(("kept" if key in self._kept else "read",))
        if key not in self._kept:
            try:
                self._kept[key] = await self._work.on(tenant, WORK_FACTOR * max(len(key), 1024), make)
            except (ValueError, InvalidRequest):
                self._checks.add(("refused",))
                raise
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def checked_grammar(constraint: Constraint) -> str:
    """The grammar of a constraint. Raises ValueError that says what is wrong with it, where, and what to do."""
    if constraint.HasField("json_schema"):
        return _schema(constraint.json_schema)
    if constraint.HasField("json_object"):
        return compilable(schema_grammar({"type": "object"}))
    if constraint.HasField("regex"):
        return compilable(regex_grammar(constraint.regex))
    if constraint.HasField("choices"):
        return compilable(choice_grammar(constraint.choices.values))
    num_rules = constraint.grammar.count("::=")
    if num_rules > MAX_RULES:
        raise ValueError(f"it has {num_rules} rules; at most {MAX_RULES} are allowed")
    grammar = compilable(gbnf_grammar(constraint.grammar))
    _check_ends("the rules", grammar_ways(GrammarParser().parse(constraint.grammar)))
    return grammar


def _check_ends(what: str, ways: Iterable[Way]) -> None:
    names = sorted(part for part in endless(ways) if isinstance(part, str))
    if names:
        raise ValueError(f"no text can complete {what} {', '.join(names[:5])}: each needs one of them again")


def compilable(grammar: str) -> str:
    """The grammar as it is. Raises ValueError if it cannot be compiled within its limits."""
    if problem := grammar_problem(grammar):
        raise ValueError(re.split(r"\n +\d+ \|", problem)[0])  # behind it is the grammar as it was rewritten
    return grammar


def _schema(text: str) -> str:
    schema = read_schema(text)
    try:
        return compilable(schema_grammar(schema))
    except ValueError as error:
        problem = str(error).rpartition("failed to compile JSON schema: ")[2]
        if keywords := unkept_keywords(schema, error):
            problem = f"this server cannot keep to {keywords}; leave it out"
        elif problem.startswith("oneOf"):
            places = ", ".join(_places(schema, "oneOf")[:5])
            problem = f"this server cannot keep to {places}, whose schemas overlap; use anyOf"
        elif problem and (where := _place_of(problem, schema)):
            problem = f"{problem}, at {where}"
        raise ValueError(problem) from error


def _place_of(problem: str, schema: Mapping[str, Any]) -> str:
    """Where the innermost schema is that has this problem by itself; "": it is not among the first that are tried."""
    found = list(_schemas(schema))
    for where, part in found[: -MOST_TRIED - 1 : -1]:
        if len(json.dumps(part)) <= MOST_TRIED_CHARS and problem in grammar_problem(schema_grammar(part)):
            return where
    return ""


def unkept_keywords(schema: Mapping[str, Any], error: ValueError) -> str:
    """The keywords of a schema that keep a grammar from being compiled, with their places; "": others do."""
    if "Unimplemented keys" not in str(error):
        return ""
    keywords = dict.fromkeys(
        keyword for _, part in _schemas(schema) for keyword in part if f'"{keyword}"' in str(error)
    )
    return ", ".join([place for keyword in keywords for place in _places(schema, keyword)][:5])


def read_schema(text: str) -> dict[str, Any]:
    """A JSON Schema that is within the limits. Raises ValueError that says what is wrong with it, where."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError("it must be a JSON object: for any value, write {}")
    if _is_deeper(schema, MAX_NESTING):
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep; flatten it, or name parts in $defs")
    for where, part in _schemas(schema):
        if _num_optional(part) > MAX_OPTIONAL:
            problem = f"properties at {where} has {_num_optional(part)} that are not required"
            raise ValueError(f"{problem}; at most {MAX_OPTIONAL} are allowed: add some to required")
    if "x-guidance" in schema:
        raise ValueError("x-guidance at /: the server sets it; leave it out")
    if moved := [place for place in _places(schema, "$id") if place != "$id at /"]:  # it moves where $ref leads
        raise ValueError(f"this server cannot keep to {', '.join(moved[:5])}; leave it out")
    _check_ends("the schemas at", schema_ways(_schemas(schema)))
    return schema


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts: Collection[Any] = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _num_optional(schema: dict[str, Any]) -> int:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return 0
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    return len(properties.keys() - needed)


def _places(schema: Any, keyword: str) -> list[str]:
    """Where a keyword is in a schema and in those inside."""
    return [f"{keyword} at {where}" for where, part in _schemas(schema) if keyword in part]


def _schemas(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and those inside, each with its path."""
    if isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from _schemas(part, f"{where}/{index}")
    elif isinstance(schema, dict):
        yield where or "/", schema
        for keyword, value in schema.items():
            if keyword in _NAMED and isinstance(value, dict):
                for name, part in value.items():
                    yield from _schemas(part, f"{where}/{keyword}/{name}")
            elif keyword not in _VALUES:
                yield from _schemas(value, f"{where}/{keyword}")
