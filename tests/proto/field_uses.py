"""Which fields of the contract the service reads and sets, by the types that mypy finds for its expressions.

By types, because names alone would lie: something called `labels` is read in many places.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mypy.build import build
from mypy.modulefinder import BuildSource
from mypy.options import Options
from mypy.types import CallableType, Instance, Type, TypedDictType, TypeVarType, UnionType, get_proper_type

PACKAGES = ("loraplex.v1.", "loraplex_service.dialect_stubs.")
# What the types of messages and of their fields need.
TYPED = ("loraplex_service", "loraplex_adapters", "loraplex", "google.protobuf")
# What they do not need, and would take as long to read as all else.
UNTYPED = ("numpy", "matplotlib")
SETTERS = ("append", "add", "extend", "update", "CopyFrom", "MergeFrom")

FOLDERS = ("client", "service", "engine", "adapters")  # from which packages are imported

# (message, field), such as ("Adapter", "name"); of a dialect ("kserve_v2_pb2.ModelConfig", "name")
Field = tuple[str, str]
Place = tuple[int, int, int | None, int | None]  # of an expression


@dataclass(slots=True)
class Uses:
    """What code does with fields."""

    read: set[Field] = field(default_factory=set)
    given: set[Field] = field(default_factory=set)  # set, or made with


def field_uses(files: list[Path]) -> Uses:
    """Of all fields, in these files of the service. Takes seconds."""
    options = Options()
    options.export_types = options.preserve_asts = options.explicit_package_bases = options.namespace_packages = True
    options.incremental, options.ignore_missing_imports = False, True
    options.python_executable, options.mypy_path = sys.executable, list(FOLDERS)
    options.follow_imports = "skip"
    options.per_module_options = {f"{name}.*": {"follow_imports": "silent"} for name in TYPED}
    skipped = {"follow_imports": "skip", "follow_imports_for_stubs": True}
    options.per_module_options |= {pattern: skipped for name in UNTYPED for pattern in (name, f"{name}.*")}
    texts = _apart(files)
    result = build([BuildSource(str(path), _module(path), text) for path, text in texts.items()], options)
    types = {
        (expression.line, expression.column, expression.end_line, expression.end_column): kind
        for expression, kind in result.types.items()
    }
    uses = Uses()
    for text in texts.values():
        _Finder(types, uses).visit(ast.parse(text))
    return uses


def _apart(files: list[Path]) -> dict[Path, str]:
    """The files, so that no two have a line of the same number: mypy says on which line expressions are, not where."""
    texts = {path: path.read_text() for path in files}
    longest = max(text.count("\n") for text in texts.values()) + 1
    return {path: "\n" * (longest * number) + text for number, (path, text) in enumerate(texts.items())}


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")


class _Finder(ast.NodeVisitor):
    def __init__(self, types: Mapping[Place, Type], uses: Uses) -> None:
        self._types = types
        self._uses = uses

    def visit_Attribute(self, node: ast.Attribute) -> None:
        used = self._uses.read if isinstance(node.ctx, ast.Load) else self._uses.given
        used |= self._fields(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        callee = get_proper_type(self._type(node.func))
        if isinstance(callee, CallableType):
            for message in _messages(callee.ret_type) if callee.is_type_obj() else ():
                self._uses.given |= {(message, name) for argument in node.keywords for name in self._names(argument)}
            self._protocols(callee, node)
        if isinstance(node.func, ast.Attribute):
            self._method(node.func, node.args)
        else:
            self.visit(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(argument)

    def _names(self, argument: ast.keyword) -> Iterator[str]:
        """The names that a keyword argument gives: its own, or with `**` all those of a TypedDict."""
        if argument.arg is not None:
            yield argument.arg
        elif isinstance(fields := get_proper_type(self._type(argument.value)), TypedDictType):
            yield from fields.items

    def _method(self, method: ast.Attribute, arguments: list[ast.expr]) -> None:
        if method.attr in SETTERS and isinstance(method.value, ast.Attribute):
            self._uses.given |= self._fields(method.value)  # and is not read by that
            self.visit(method.value.value)
            return
        if method.attr == "HasField" and isinstance(arguments[0], ast.Constant):
            self._uses.read |= {(message, str(arguments[0].value)) for message in _messages(self._type(method.value))}
        self.visit(method.value)

    def _protocols(self, callee: CallableType, call: ast.Call) -> None:
        """A function that takes anything with certain fields reads those of what it is given."""
        for position, argument in enumerate(call.args):
            formal = callee.argument_by_position(position)
            kind = get_proper_type(formal.typ) if formal is not None else None
            if isinstance(kind, Instance) and kind.type.is_protocol:
                messages = set(_messages(self._type(argument)))
                self._uses.read |= {(message, name) for message in messages for name in kind.type.protocol_members}

    def _fields(self, node: ast.Attribute) -> set[Field]:
        return {(message, node.attr) for message in _messages(self._type(node.value))}

    def _type(self, node: ast.expr) -> Type | None:
        return self._types.get((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset))


def _messages(kind: Type | None) -> Iterator[str]:
    """The names in the contract, or in a dialect, of the messages that something of this type may be."""
    proper = get_proper_type(kind)
    if isinstance(proper, UnionType):
        for item in proper.items:
            yield from _messages(item)
    elif isinstance(proper, TypeVarType):
        yield from _messages(proper.upper_bound)
    elif isinstance(proper, Instance) and proper.type.fullname.startswith(PACKAGES):
        contract, dialects = PACKAGES
        name = proper.type.fullname.removeprefix(dialects)
        yield name.removeprefix(contract).partition(".")[2] if name.startswith(contract) else name
