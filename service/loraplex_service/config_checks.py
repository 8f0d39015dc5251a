"""Checks of a configuration that do not depend on the meaning of its keys. Each mistake is reported with its place.

Checked are unknown keys, values of a wrong type, and numbers out of range.
"""

import difflib
from collections.abc import Collection, Iterator
from dataclasses import replace
from types import NoneType
from typing import Any, get_args, get_origin

import msgspec

from loraplex_engine.link.bounds import Bounds
from loraplex_engine.link.config import EngineConfig

# Floats of which 0 makes sense: others are above it.
MAY_BE_ZERO = frozenset(
    (
        "adapter_load_wait_seconds",
        "drain_grace_seconds",
        "lame_duck_seconds",
        "leeway_seconds",
        "restart_delay_seconds",
        "restart_delay_max_seconds",
        "resume_seconds",
        "stable_seconds",
        "stop_seconds",
        "trace_ratio",
    )
)
# Beyond these timers spin or overflow, and sums forget what is added to them.
AMOUNTS = Bounds(1e-6, 1e9)
SECONDS = Bounds(1e-3, 2e6)  # gRPC counts milliseconds in 32 bits
COUNTS = Bounds(0)  # of what is a whole number

TOP = "the top level"
Section = type[msgspec.Struct]


class Shape:
    """Compares the content of a file with the sections that the configuration has."""

    def __init__(self, whole: Section) -> None:
        """`whole`: the section of the whole file."""
        self.mistakes: list[str] = []
        self._places: dict[str, str] = {}  # of all keys; of those with several, the first
        for place, section in sections(whole):
            for key in section.__struct_fields__:
                self._places.setdefault(key, place or TOP)

    def pruned(self, value: Any, kind: Any, place: str = "") -> Any:
        """Return the value without unknown keys, which are noted. `kind`: the type that the value must have."""
        if get_origin(kind) is tuple and isinstance(value, list):
            return [self.pruned(item, get_args(kind)[0], f"{place}[{index}]") for index, item in enumerate(value)]
        if get_origin(kind) is dict and isinstance(value, dict) and (section := _section(get_args(kind)[1])):
            return {key: self.pruned(item, section, _inside(place, key)) for key, item in value.items()}
        section = _section(kind)
        if section is not None and isinstance(value, dict):
            return self._pruned_section(value, section, place)
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            problem, _, inside = str(error).partition(" - at `$")
            self.mistakes.append(f"{problem} - at `{place}{inside.removesuffix('`')}`")
        return value

    def _pruned_section(self, value: dict[Any, Any], section: Section, place: str) -> dict[str, Any]:
        fields = {field.name: field for field in msgspec.structs.fields(section)}
        where = place or TOP
        for key in value.keys() - fields.keys():
            self.mistakes.append(f"unknown key {key!r} in {where}{self._hint(str(key), fields)}")
        for name, field in fields.items():
            if field.required and name not in value:
                self.mistakes.append(f"missing required field `{name}` in {where}")
        known = {key: item for key, item in value.items() if key in fields}
        return {key: self.pruned(item, fields[key].type, _inside(place, key)) for key, item in known.items()}

    def _hint(self, key: str, own: Collection[str]) -> str:
        """What may have been meant by an unknown key, in a section that has its own keys."""
        if key in self._places:
            return f": it belongs in {self._places[key]}"
        for keys in (own, self._places):
            if similar := difflib.get_close_matches(key, sorted(keys), n=1):
                elsewhere = "" if similar[0] in own else f" in {self._places[similar[0]]}"
                return f"; did you mean {similar[0]!r}{elsewhere}?"
        return ""


def sections(whole: Section, place: str = "") -> Iterator[tuple[str, Section]]:
    """A section and those in it, each with its place, such as "models[]"."""
    yield place, whole
    for field in msgspec.structs.fields(whole):
        inside, kind = _inside(place, field.name), field.type
        if get_origin(kind) is tuple:
            inside, kind = f"{inside}[]", get_args(kind)[0]
        elif get_origin(kind) is dict:
            inside, kind = f"{inside}.*", get_args(kind)[1]
        if (within := _section(kind)) is not None:
            yield from sections(within, inside)


def bounds_of(section: Section, name: str, *, is_whole: bool) -> Bounds:
    """What a number of a section may be: what the section states, else what holds for all of its kind."""
    stated: Bounds | None = getattr(section, "BOUNDS", {}).get(name)
    if stated is not None:
        return stated
    if is_whole:
        return COUNTS
    return replace(SECONDS if name.endswith("_seconds") else AMOUNTS, zero=name in MAY_BE_ZERO)


def number_problems(section: msgspec.Struct, place: str = "") -> Iterator[str]:
    """Problems with the numbers of a section and the sections in it, except those that engines check themselves."""
    for name in section.__struct_fields__:
        value = getattr(section, name)
        inside = _inside(place, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            bounds = bounds_of(type(section), name, is_whole=isinstance(value, int))
            if not bounds.has(value):
                yield f"{place}{': ' if place else ''}{name} {value} must be {bounds}"
        elif isinstance(value, msgspec.Struct):
            yield from number_problems(value, inside)
        elif isinstance(value, dict):
            yield from _problems_of_all(value.items(), inside + ".{}")
        elif isinstance(value, tuple):
            yield from _problems_of_all(enumerate(value), inside + "[{}]")


def _problems_of_all(items: Any, place: str) -> Iterator[str]:
    for key, item in items:
        if isinstance(item, msgspec.Struct) and not isinstance(item, EngineConfig):
            yield from number_problems(item, place.format(key))


def _section(kind: Any) -> Section | None:
    """The section class of a type that is a section or an optional section; None: it is neither."""
    kinds = [one for one in (get_args(kind) if get_origin(kind) is not None else (kind,)) if one is not NoneType]
    sections = [one for one in kinds if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    return sections[0] if sections == kinds else None


def _inside(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)
