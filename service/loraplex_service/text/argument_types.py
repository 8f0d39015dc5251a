"""What the casting of a call's arguments needs of their schema.

transformers goes through all of an argument's schema each time, however long it is. The distinct types do as well.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_TYPES = {"string", "integer", "number", "boolean", "null", "object", "array"}


def argument_types(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, with nothing but the types of each, in the order in which they are tried."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {"properties": {name: {"type": _types(schema)} for name, schema in properties.items()}}


def _types(schema: Any) -> list[str]:
    found: dict[str, None] = {}
    waiting: list[Any] = [schema] if isinstance(schema, dict) else []
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += reversed([*_told(each)])
        elif each in _TYPES:
            found[each] = None
    return list(found)


def _told(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The types that a schema names, and the schemas that it offers the choice of."""
    declared = schema.get("type")
    yield from (each for each in _listed(declared, [declared]) if isinstance(each, str))
    for union in ("anyOf", "oneOf"):
        yield from (each for each in _listed(schema.get(union), []) if isinstance(each, dict))
    if schema.get("nullable"):
        yield "null"


def _listed(value: Any, otherwise: list[Any]) -> list[Any]:
    return value if isinstance(value, list) else otherwise
