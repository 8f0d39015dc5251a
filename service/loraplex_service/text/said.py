"""Rendering of chat templates that tracks for each character whether the template or the caller wrote it.

The caller's text goes into the template as `Said`: a string that remembers which of its characters are the caller's,
through all string operations of a template. An operation that cannot be tracked is refused, never guessed. Imported by
the worker, which imports nothing else of ours.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import Any, NoReturn, SupportsIndex

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils


class Said(str):
    """A text with the caller's characters marked. Methods that are not here would lose the marks: see `call`."""

    __slots__ = ("mask",)

    mask: bytes  # of each character: 1 if the caller wrote it

    def __new__(cls, text: str, mask: bytes | None = None) -> "Said":
        """`mask`: the caller's characters; None: all of them."""
        said = super().__new__(cls, text)
        said.mask = b"\1" * len(text) if mask is None else mask
        return said

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> "Said":
        if not isinstance(key, slice):
            return Said(str.__getitem__(self, key), bytes([self.mask[key]]))
        return Said(str.__getitem__(self, key), self.mask[key])

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Said":
        return Said(str.__mul__(self, count), self.mask * count)

    __rmul__ = __mul__

    def lstrip(self, chars: str | None = None, /) -> "Said":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Said":
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> "Said":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> "Said":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> "Said":
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._parts(str.splitlines(self, True), "")
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._cut(self.find(sep), sep, (self, "", ""))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._cut(self.rfind(sep), sep, ("", "", self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            refuse("replace() of nothing")
        return interleaved(new, self.split(old, count))

    def upper(self) -> "Said":
        return self._same_length(str.upper(self))

    def lower(self) -> "Said":
        return self._same_length(str.lower(self))

    def capitalize(self) -> "Said":
        return self._same_length(str.capitalize(self))

    def join(self, parts: Iterable[str], /) -> str:
        return interleaved(self, list(parts))

    def _cut(self, at: int, sep: str, otherwise: tuple[str, str, str]) -> tuple[str, str, str]:
        end = at + len(sep)
        return otherwise if at < 0 else (self[:at], self[at:end], self[end:])

    def _parts(self, parts: Sequence[str], sep: str | None) -> list[str]:
        """Find these parts of the text, in order, with `sep` between each two (None: whitespace)."""
        found: list[str] = []
        position = 0
        for part in parts:
            start = self.find(part, position)
            found.append(self[start : start + len(part)])
            position = start + len(part) + len(sep or "")
        return found

    def _same_length(self, text: str) -> "Said":
        if len(text) != len(self):
            refuse("a change of case that changes the length")
        return Said(text, self.mask)


def mask_of(text: str) -> bytes:
    """The mask of a text: of an unmarked one all False, since it is the template's own."""
    return text.mask if isinstance(text, Said) else bytes(len(text))


def concat(parts: Iterable[str]) -> str:
    """Join marked texts."""
    parts = list(parts)
    text = "".join(parts)
    return Said(text, b"".join(map(mask_of, parts))) if any(isinstance(part, Said) for part in parts) else text


def interleaved(separator: str, parts: Sequence[str]) -> str:
    """Join marked texts as `separator.join(parts)` does."""
    between = [piece for part in parts for piece in (separator, part)]
    return concat(between[1:])


def marked(value: Any) -> Any:
    """A copy of a JSON value with all of its texts, keys included, marked as the caller's."""
    match value:
        case str():
            return Said(value)
        case dict():
            return {Said(key): marked(item) for key, item in value.items()}
        case list():
            return [marked(item) for item in value]
    return value


def spans(text: str) -> list[tuple[int, int]]:
    """The parts of a text that are the caller's, each [start, end)."""
    return [found.span() for found in re.finditer(b"\1+", mask_of(text))]


def says(value: Any) -> bool:
    """Whether a value contains, or may contain, the caller's text."""
    match value:
        case Said():
            return True
        case str() | int() | float() | None:
            return False
        case Mapping():
            return any(says(key) or says(item) for key, item in value.items())
        case list() | tuple() | set():
            return any(map(says, value))
    return isinstance(value, Iterable | jinja2.utils.Namespace) and not isinstance(value, jinja2.Undefined)


def refuse(what: str, *arguments: Any) -> NoReturn:
    raise jinja2.TemplateError(
        f"literal_content: the template applies {what} to the text of messages, which then cannot be told from the "
        "template's own. Leave literal_content out, or change the template"
    )


# ---- the environment -------------------------------------------------------------------------------------------------

# Methods of texts that give no text.
_TELLING = {"startswith", "endswith", "find", "rfind", "index", "rindex", "count"}  # and is…()
_FOLLOWED = frozenset(name for name in vars(Said) if not name.startswith("_")) - {"mask"}

# Filters that make no new text of what they are given, or use nothing for it but operations that `Said` follows.
_COUNTING = {"abs", "count", "float", "int", "length", "max", "min", "random", "round", "sum"}
_CHOOSING = {"attr", "d", "default", "first", "last", "map", "reject", "rejectattr", "select", "selectattr", "unique"}
_ARRANGING = {"batch", "dictsort", "groupby", "items", "list", "reverse", "slice", "sort"}
_HARMLESS = _COUNTING | _CHOOSING | _ARRANGING
_OF_TEXT = ("capitalize", "lower", "trim", "upper")  # harmless for a text: anything else they print first
_ESCAPING = ("e", "escape", "forceescape")  # what they make joins by rules of its own
_HOLDERS = (dict, list, tuple, jinja2.runtime.LoopContext, jinja2.utils.Cycler, jinja2.utils.Joiner)
_MAKERS = (dict, range, jinja2.utils.Namespace, jinja2.utils.Cycler, jinja2.utils.Joiner)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles `~` to a function of the environment: jinja's own joins C strings."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class FollowingEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Renders as its base class does, and keeps the marks of `Said` texts."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)
    intercepted_binops = frozenset({"%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_shown, **options)

    def follow(self, speechless: Callable[..., Any]) -> None:
        """Have the filters keep the marks. `speechless`: what may be called with the caller's words, and says none."""
        self._speechless = speechless
        own: dict[str, Callable[..., Any]] = {
            "join": _join,
            "replace": _replace,
            "tojson": tojson,
            "string": _string,
            "safe": _shown,
        }
        own |= {name: _of_text(self.filters[name]) for name in _OF_TEXT}
        own |= {name: partial(refuse, f"the filter {name}") for name in _ESCAPING}
        for name, function in list(self.filters.items()):
            if name not in _HARMLESS:
                self.filters[name] = own.get(name) or _refusing(name, function)

    def concat_values(self, values: Iterable[Any]) -> str:
        return concat(str(_shown(value)) for value in values)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if says(left) or says(right):
            refuse(operator)
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if says(owner) or says(args) or says(kwargs):
            obj = self._following(obj, owner)
        return super().call(context, obj, *args, **kwargs)

    def _following(self, function: Any, owner: Any) -> Any:
        """Wrap a function so that it keeps the marks."""
        name = getattr(function, "__name__", type(function).__name__)
        if isinstance(owner, str):
            if name in _FOLLOWED:
                return getattr(Said(owner, mask_of(owner)), name)
            if name in _TELLING or name.startswith("is"):
                return function
        elif (
            isinstance(owner, _HOLDERS)
            or isinstance(function, jinja2.runtime.Macro)
            or function in _MAKERS
            or function is self._speechless
        ):
            return function
        refuse(f"{name}()")

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and isinstance(value.__self__, Said):
            refuse("format()")
        return wrapped

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        if tree.find(jinja2.nodes.EvalContextModifier) is not None:
            refuse("autoescape")
        return tree


def _shown(value: Any) -> Any:
    """The text of a value as a template prints it."""
    if isinstance(value, str) or not says(value):
        return value
    if not isinstance(value, dict | list):
        refuse("printing of an object as a whole")
    return _written(value, str, "'", _repr)


def _string(value: Any) -> str:
    return str(_shown(value))


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *args: function(_shown(value), *args)


def _refusing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if says(args) or says(kwargs):
            refuse(f"the filter {name}")
        return function(*args, **kwargs)

    return refusing


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        refuse("join with an attribute")
    return interleaved(d, [_string(part) for part in value])


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = _string(value)
    return Said(text, mask_of(text)).replace(old, new, -1 if count is None else count)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The JSON of a value, with the caller's text marked."""

    def write(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)

    return _written(value, write, "", partial(_escaped, ensure_ascii=ensure_ascii), sort_keys)


def _written(
    value: Any, write: Callable[[Any], str], quote: str, write_said: Callable[[Said], str], sort_keys: bool = False
) -> str:
    """Write a value with placeholders for the caller's texts, then replace each, with its quotes, by `write_said`."""
    name, hidden = secrets.token_hex(8), list[Said]()

    def hide(value: Any) -> Any:
        match value:
            case Said():
                hidden.append(value)
                return f"{name}-{len(hidden) - 1}-"
            case dict():
                items = sorted(value.items()) if sort_keys else value.items()
                return {hide(key): hide(item) for key, item in items}
            case list():
                return [hide(item) for item in value]
            case tuple():
                return tuple(hide(item) for item in value)
        if says(value):
            refuse("printing of an object as a whole")
        return value

    pieces = re.split(f"{quote}{name}-([0-9]+)-{quote}", write(hide(value)))
    pieces[1::2] = [write_said(hidden[int(number)]) for number in pieces[1::2]]
    return concat(pieces)


def _repr(text: Said) -> Said:
    if 0 in text.mask:
        refuse("printing of a list with texts that are literal in part")
    return Said(str.__repr__(text))


def _escaped(text: Said, ensure_ascii: bool) -> str:
    """The text as it stands between the quotes of JSON."""
    parts: list[str] = []
    for run in re.finditer(b"\0+|\1+", text.mask):
        written = json.dumps(str.__getitem__(text, slice(*run.span())), ensure_ascii=ensure_ascii)[1:-1]
        parts.append(Said(written, run[0][:1] * len(written)))
    return concat(parts)
