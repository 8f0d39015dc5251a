"""Arguments are cast by the types of their schemas as by the schemas themselves, however long those are."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from loraplex_service.text import argument_types
from tests.service.text.test_message_reader import SYNTAXES

ANY_TYPE = st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array", "other"])
SCHEMAS = st.recursive(
    st.fixed_dictionaries({}, optional={"type": ANY_TYPE | st.lists(ANY_TYPE | st.just(1)), "nullable": st.booleans()}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": ANY_TYPE,
            "anyOf": st.lists(inner | st.just("integer")),
            "oneOf": st.lists(inner) | st.none(),
            "nullable": st.booleans(),
            "items": inner,
        },
    ),
)
VALUES = ["3", "3.0", "3.5", "1", "true", "False", "null", "None", "[1]", '{"a": 1}', "x", "", ["1", "null"], 2]


def cast(parameters: Any) -> Any:
    """What is read of a call whose arguments are all that could be cast."""
    call = {"name": "t", "arguments": {str(number): value for number, value in enumerate(VALUES)}}
    tools: list[Any] = [{"type": "function", "function": {"name": "t", "parameters": parameters}}]
    source = f"<tool_call>{json.dumps(call)}</tool_call>"
    return parse_response(source, dict(SYNTAXES["hermes"].response_template), prefix="", tools=tools)


@given(SCHEMAS)
def test_arguments_are_cast_as_by_the_whole_schema(schema: Any) -> None:
    parameters = {"type": "object", "properties": {str(number): schema for number in range(len(VALUES))}}
    assert repr(cast(argument_types(parameters))) == repr(cast(parameters))


@pytest.mark.parametrize("parameters", [{}, {"properties": None}, {"properties": {"0": True}}])
def test_without_types_nothing_is_cast(parameters: Any) -> None:
    assert cast(argument_types(parameters)) == cast(parameters)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["object", "null"] * 3000},
        {"anyOf": [{}, {"type": "object"}, {"oneOf": [{"type": "null"}]}] * 3000},
        {"description": "x" * 9000, "properties": {"a": {"type": "array"}}, "type": ["object", "null"]},
    ],
)
def test_of_a_long_schema_the_distinct_types_are_left(schema: Any) -> None:
    assert argument_types({"properties": {"a": schema}}) == {"properties": {"a": {"type": ["object", "null"]}}}


def test_a_schema_may_be_nested_deeply() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(20_000):
        schema = {"anyOf": [schema], "nullable": True}
    assert argument_types({"properties": {"a": schema}}) == {"properties": {"a": {"type": ["integer", "null"]}}}
