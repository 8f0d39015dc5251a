"""Which forms are taken, and what callers are told of those that are not."""

import json
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
        Constraint(json_object=JsonObject()),
        Constraint(regex="[a-z]+"),
        Constraint(choices=Choices(values=["a/b", "\n"])),
        Constraint(grammar='root ::= "a" root | "b"'),
    ],
    ids=str,
)
def test_a_form_that_can_be_kept_to_is_taken(constraint: Constraint) -> None:
    assert checked_grammar(constraint)
