"""Every field that a package's types know in a request, in whatever depth. Runs in that package's own environment.

    python fields.py '[["/v1/messages", "anthropic.types.message_create_params:MessageCreateParamsStreaming"]]'

Prints a JSON list: of each field the endpoint, its name, a smallest body without it, and the same one with it.
"""

import importlib
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import typing_extensions

UNIONS = (typing.Union, types.UnionType)
WRAPPERS = (typing_extensions.Required, typing_extensions.NotRequired, typing_extensions.Annotated)
PLAIN = {int: 1, float: 1.0, bool: True, object: {}, Any: {}}
KINDS = ("type", "role")  # keys that tell apart the items of a list


class Field(NamedTuple):
    """A field by its name, and what differs by it alone."""

    name: str
    without: Any
    given: Any


def members(kind: Any) -> Iterator[tuple[str, Any, bool]]:
    """The keys of a TypedDict, their types, and whether they are required."""
    for name, hint in typing_extensions.get_type_hints(kind, include_extras=True).items():
        yield name, hint, typing.get_origin(hint) is typing_extensions.Required


def alternatives(hint: Any) -> list[Any]:
    """The types that a value may have, but for None and for the package's classes of answers."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in WRAPPERS:
        return alternatives(inner[0])
    if origin in UNIONS:
        return [each for one in inner for each in alternatives(one)]
    is_answer = isinstance(hint, type) and hasattr(hint, "model_fields")
    return [] if hint is type(None) or is_answer else [hint]


def smallest(hint: Any, key: str = "") -> Any:
    """A value of the type that has nothing that may be left out. Texts are the keys that they are below."""
    hint = alternatives(hint)[0]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if typing_extensions.is_typeddict(hint):
        return {name: smallest(each, f"{key} {name}".strip()) for name, each, required in members(hint) if required}
    if origin is typing.Literal:
        return inner[0]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"1": smallest(inner[1], key)}
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return [smallest(inner[0], key)]
    return key if hint is str else PLAIN[hint]


def fields(hint: Any, around: tuple[Any, ...] = ()) -> Iterator[Field]:
    """All fields of the type. `around`: the types that it is part of; one within itself is not looked into again."""
    for kind in alternatives(hint):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if typing_extensions.is_typeddict(kind) and kind not in around:
            yield from of_object(kind, (*around, kind))
        elif isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
            for item in alternatives(inner[0]):
                for field in fields(item, around):
                    name = next((field.given[key] for key in KINDS if isinstance(field.given.get(key), str)), "")
                    yield Field(f"[{name}].{field.name}", [field.without], [field.given])


def of_object(kind: Any, around: tuple[Any, ...]) -> Iterator[Field]:
    least = smallest(kind)
    for name, hint, required in members(kind):
        if not required and alternatives(hint):
            yield Field(name, least, {**least, name: smallest(hint, name)})
        for field in fields(hint, around):
            inside = f"{name}{'' if field.name.startswith('[') else '.'}{field.name}"
            yield Field(inside, {**least, name: field.without}, {**least, name: field.given})


def main() -> None:
    found = []
    for path, where in json.loads(sys.argv[1]):
        module, _, name = where.partition(":")
        found += [(path, *field) for field in fields(getattr(importlib.import_module(module), name))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
