"""Which forms are taken, and what callers are told of those that are not."""

import json
import re
from typing import Any

import pytest

from loraplex.v1.generation_pb2 import Choices, Constraint, JsonObject
from loraplex_service.requests.forms import MAX_NESTING, MAX_OPTIONAL, MAX_RULES, checked_grammar


def schema(value: Any) -> Constraint:
    return Constraint(json_schema=json.dumps(value))


def an_object(num_properties: int, required: Any = ()) -> dict[str, Any]:
    return {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(num_properties)}} | (
        {"required": required} if required else {}
    )


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"items": value}
    return value


REFUSED = {
    "no JSON": (Constraint(json_schema="{"), "it is not JSON"),
    "no object": (schema([1]), "must be a JSON object"),
    "too deep": (schema(nested(MAX_NESTING)), "nested more than 64 levels"),
    "endless depth": (Constraint(json_schema="[" * 30_000 + "]" * 30_000), "it is not JSON|must be a JSON object"),
    "a keyword": (schema({"properties": {"a": {"uniqueItems": True}}}), "uniqueItems at /properties/a; leave it out"),
    "options that overlap": (
        schema({"items": {"oneOf": [{"type": "integer"}, {"minimum": 2}]}}),
        "cannot keep to oneOf at /items, whose schemas overlap; use anyOf",
    ),
    "another base of references": (schema({"properties": {"a": {"$id": "x"}}}), r"\$id at /properties/a; leave it out"),
    "an unknown format": (schema({"type": "string", "format": "iri"}), "^Unknown format: iri"),
    "settings": (schema({"x-guidance": {"lenient": True}}), "x-guidance at /"),
    "optional properties": (schema(an_object(MAX_OPTIONAL + 1)), "properties at / has 101 that are not required"),
    "optional properties inside": (
        schema({"$defs": {"a": {"anyOf": [an_object(200, ["k0", 1, "other"])]}}}),
        r"properties at /\$defs/a/anyOf/0 has 199",
    ),
    "required that is no list": (schema(an_object(MAX_OPTIONAL + 1, "k0")), "has 101 that are not required"),
    "an expression": (Constraint(regex="(a"), "."),
    "a cut escape": (Constraint(regex="a\\"), "escapes nothing"),
    "rules": (Constraint(grammar='root ::= "a"\n' * (MAX_RULES + 1)), "it has 1001 rules"),
    "a rule that leads to itself": (Constraint(grammar="root ::= root"), "complete the rules root: each needs"),
    "a rule that goes on for ever": (Constraint(grammar='root ::= "a" root'), "the rules root:"),
    "rules that lead to each other": (
        Constraint(grammar='root ::= "a" | "b" x+\nx ::= (y | "c" y{2})\ny ::= x'),
        "the rules x, y:",
    ),
    "a schema that is itself": (schema({"$ref": "#"}), "the schemas at /: each needs"),
    "a schema that is all of itself": (schema({"allOf": [{"$ref": "#"}]}), "the schemas at /, /allOf/0:"),
    "a property that needs itself": (
        schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "the schemas at /, /properties/a:",
    ),
    "a part that is itself": (
        schema(
            {"properties": {"a": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": {"oneOf": [{"$ref": "#/$defs/x~1y"}]}}}
        ),
        r"the schemas at /\$defs/x/y,",
    ),
    "an array that needs itself": (schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}), "at /, /items:"),
    "no root": (Constraint(grammar='a ::= "a"'), "."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_kept_to_is_refused_with_the_reason(name: str) -> None:
    constraint, problem = REFUSED[name]
    with pytest.raises(ValueError, match=problem):
        checked_grammar(constraint)


@pytest.mark.parametrize(
    "constraint",
    [
        schema({}),
        schema(an_object(MAX_OPTIONAL)),
        schema(an_object(300, [f"k{n}" for n in range(300)])),
        schema({"properties": {"properties": {"type": "string"}, "required": {"type": "string"}}}),
        schema({"enum": [an_object(200)]}),  # a value, and no schema
        schema({"type": "object", "properties": {"a": {"$ref": "#"}}}),
        schema({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}),  # numbers have no properties
        schema({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        schema({"$id": "https://example.com/a", "properties": {"$id": {"type": "string"}}}),
        schema({"type": "array", "items": {"$ref": "#"}, "prefixItems": [{"type": "null"}], "minItems": 1}),
        schema({"type": "array", "items": {"$ref": "#"}}),
        Constraint(grammar='root ::= (root)* "a" x?\nx ::= root | "b"'),
        Constraint(json_object=JsonObject()),
        Constraint(regex="[a-z]+"),
        Constraint(choices=Choices(values=["a/b", "\n"])),
        Constraint(grammar='root ::= "a" root | "b"'),
    ],
    ids=str,
)
def test_a_form_that_can_be_kept_to_is_taken(constraint: Constraint) -> None:
    assert checked_grammar(constraint)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"properties": {"a": {"type": "strin"}}}, "Invalid type: strin, at /properties/a"),
        ({"items": {"items": {"pattern": "("}}}, "unclosed group, at /items/items"),
        ({"$defs": {"n": {"minimum": "a"}}, "$ref": "#/$defs/n"}, "at /$defs/n"),
        ({"type": "strin"}, "Invalid type: strin, at /"),
    ],
)
def test_what_is_wrong_inside_a_schema_is_told_with_its_place(schema: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem) + "$"):
        checked_grammar(Constraint(json_schema=json.dumps(schema)))
