"""Write the reference of the configuration's keys, docs/configuration-keys.md, from the classes that read them.

What a key means is the comment beside or above its field; what it may be is what the file is checked by. A file of the
documentation that a comment names, such as docs/scale.md, becomes a link. With `check` nothing is written: it fails
where the page is not what would be written.
"""

import ast
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator
from enum import Enum
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from loraplex_service.config import ServiceConfig, variables
from loraplex_service.config_checks import TOP, Section, bounds_of, sections
from loraplex_service.picker.config import PickerConfig

PAGE = Path(__file__).with_name("configuration-keys.md")
TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any"}
HEAD = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|"
DOCUMENT = re.compile(r"docs/(([\w-]+)\.md(?:#([\w-]+))?)")
INTRODUCTION = """\
# Keys of the configuration

<!-- Written by docs/configuration_keys.py: change the comments of the classes that read the keys, and run it. -->

Every key of the file that `loraplex serve --config FILE` reads, and of the [picker's](#the-file-of-the-picker).
[configuration.md](configuration.md) says how the file is found and read, and explains what needs more than a line.
`[]` stands for each item of a list, `*` for each name of a mapping. A key without a default (–) is required.
Numbers are finite; sizes are in bytes, and are written as numbers: 64 MiB is `67108864`.
"""


def page() -> str:
    """The whole page."""
    named = ", ".join(f"`{variable}`" for variable in variables())
    lines = [INTRODUCTION, *tables(ServiceConfig, 2), "## The environment", ""]
    lines += ["These variables set the keys of the top level that they are named after, and come before the file:", ""]
    lines += [f"{named}.", "", "## The file of the picker", "", "See [routing.md](routing.md#the-endpoint-picker).", ""]
    return "\n".join([*lines, *tables(PickerConfig, 3)]).rstrip() + "\n"


def tables(whole: Section, depth: int) -> Iterator[str]:
    """The lines of a table for each section of a file, below headings of this depth."""
    places: dict[Section, list[str]] = {}
    for place, section in sections(whole):
        places.setdefault(section, []).append(place)
    headings = {section: ", ".join(f"`{place}`" for place in found) for section, found in places.items()}
    headings[whole] = TOP.capitalize()
    anchors = {section: re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for section, text in headings.items()}
    for section, (place, *_) in places.items():
        yield from (f"{'#' * depth} {headings[section]}", "", summary(section), "", HEAD)
        for field in fields(section):
            cells = (
                f"`{place}{'.' if place else ''}{field.name}`",
                type_text(field.type, anchors),
                default_text(field),
                bounds_text(section, field),
                meaning(section, field.name),
            )
            yield f"| {' | '.join(cells)} |"
        yield ""


def summary(section: Section) -> str:
    """The first paragraph of the docstring of a section, on one line."""
    return linked(" ".join((inspect.getdoc(section) or "").partition("\n\n")[0].split()))


def fields(section: Section) -> list[FieldInfo]:
    """The fields of a section: its own, and then those of the class that it extends."""
    by_name = {field.name: field for field in msgspec.structs.fields(section)}
    return [
        by_name[name] for kind in section.__mro__ for name in vars(kind).get("__annotations__", ()) if name in by_name
    ]


def type_text(kind: Any, anchors: dict[Section, str]) -> str:
    """What a value is, in words. `anchors`: where the sections are on the page."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_text(each, anchors) for each in get_args(kind) if each is not NoneType))
    if get_origin(kind) is tuple:
        return f"list: {type_text(get_args(kind)[0], anchors)}"
    if get_origin(kind) is dict:
        return f"mapping: {type_text(get_args(kind)[1], anchors)}"
    if get_origin(kind) is Literal or issubclass(kind, Enum):
        return TYPES[str]
    return f"[section](#{anchors[kind]})" if issubclass(kind, msgspec.Struct) else TYPES[kind]


def default_text(field: FieldInfo) -> str:
    """The value that a key has where it is left out. Raises ValueError where there is no way to write it."""
    if field.required:
        return "–"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    match value:
        case None | () | dict():
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case int() | float():
            return size_text(value) if field.name.endswith("_bytes") else f"{value:g}"
        case str():
            return f"`{value}`"
        case tuple():
            return f"`[{', '.join(value)}]`"
        case msgspec.Struct():
            return "each key's own"
    raise ValueError(f"{field.name}: no way is known to write the default {value!r}")


def size_text(size: float) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << power) == 0:
            return f"{size / (1 << power):g} {unit}"
    return f"{size:g}"


def bounds_text(section: Section, field: FieldInfo) -> str:
    """The numbers or the words that a value may be; empty: any of its type."""
    if get_origin(field.type) is Literal:
        return words_text(get_args(field.type))
    kinds = {field.type, *get_args(field.type)}
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return words_text([each.value for each in kind])
    if choices := getattr(section, "CHOICES", {}).get(field.name):
        return words_text(choices)
    if get_origin(field.type) not in (tuple, dict) and kinds & {int, float}:
        return str(bounds_of(section, field.name, is_whole=int in kinds))
    return ""


def words_text(words: Any) -> str:
    return ", ".join(f"`{word}`" for word in words)


def meaning(section: Section, name: str) -> str:
    """The comment of a field, on one line. Raises ValueError where it has none."""
    for kind in section.__mro__:
        if name in vars(kind).get("__annotations__", ()) and (comment := comments(kind).get(name)):
            return linked(comment).replace("|", "\\|")
    raise ValueError(f"{section.__name__}.{name} has no comment that says what it means")


def comments(kind: type) -> dict[str, str]:
    """The comments of the fields of a class, above each and on its lines, joined."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type is tokenize.COMMENT}
    alone = {number for number, line in enumerate(source.splitlines(), 1) if line.strip().startswith("#")}
    found = {}
    [defined] = ast.parse(source).body
    assert isinstance(defined, ast.ClassDef)
    for node in defined.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            while first - 1 in alone:
                first -= 1
            found[node.target.id] = " ".join(by_line[line] for line in range(first, last + 1) if line in by_line)
    return found


def linked(text: str) -> str:
    """The text with a link for each page of the documentation that it names."""

    def link(found: re.Match[str]) -> str:
        target, name, anchor = found.groups()
        return f"[{name}{': ' + anchor.replace('-', ' ') if anchor else ''}]({target})"

    return DOCUMENT.sub(link, text)


def main() -> None:
    if sys.argv[1:] == ["check"]:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE} is not what the classes say: run docs/configuration_keys.py")
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
