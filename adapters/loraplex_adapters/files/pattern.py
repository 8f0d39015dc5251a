"""Patterns of modules' paths, matched in time that a hostile pattern cannot blow up.

A pattern comes with an adapter or a model, and Python's `re` can be made to run for ever while it holds the interpreter
lock that the step loop needs. Here a pattern is matched by following all alternatives at once: the work is bounded by
the size of the pattern times the length of the name. Every single-character piece is still matched by `re` itself, so
that classes and escapes mean what they mean there. Look-around, back-references and possessive repeats are refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

MAX_PATTERN_LENGTH = 1024  # characters
MAX_REPEAT = 64  # of {n,m}
MAX_DEPTH = 8  # nested groups

# Where a piece may end, given where it may start: positions in the name.
Piece = Callable[[str, frozenset[int]], frozenset[int]]

_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
# Characters that stand for themselves, the last of which is not repeated.
_LITERAL = re.compile(r"(?:[^\\.^$*+?{}\[\]()|]|\\[^0-9A-Za-z])+(?![*+?{])")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDwWsS]|[^0-9A-Za-z])")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
# A character repeated without end.
_RUN = re.compile(rf"(?P<one>{_CLASS.pattern}|{_ESCAPE.pattern}|[^\\^$*+?{{}}\[\]()|])(?P<times>[*+])(?!\+)\??")
# What `re` warns of, because it may come to mean an operation on sets: "[[" and doubled signs in a class.
_SET_OPERATION = re.compile(r"\\.|(?P<operation>\[\^?(?:\[|\]?(?:\\.|[^\]\\])*?(?:--|&&|~~|\|\|)))", re.DOTALL)


class ModulePattern:
    """A regular expression that is matched against modules' paths.

    Raises ValueError for a pattern that `re` would refuse too, or that needs what is not supported.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ValueError(f"pattern of {len(pattern)} characters: at most {MAX_PATTERN_LENGTH} are allowed")
        if any(found["operation"] for found in _SET_OPERATION.finditer(pattern)):
            raise ValueError(f"pattern {pattern!r}: a set operation within brackets is not supported")
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        self.pattern = pattern
        self._piece = _Parser(pattern).parse()

    def matches(self, module: str) -> bool:
        """Whether `(.*\\.)?(pattern)$` matches a path, as PEFT matches rank_pattern and alpha_pattern.

        Source: peft.utils.other.get_pattern_key.
        """
        starts = frozenset([0, *(i + 1 for i, character in enumerate(module) if character == ".")])
        return len(module) in self._piece(module, starts)

    def match(self, module: str) -> bool:
        """Whether the pattern matches a path from its beginning on, as `re.match`."""
        return bool(self._piece(module, frozenset([0])))


class _Parser:
    """Recursive descent over the pattern's text. `re` has accepted it, so brackets and repeats are well-formed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> Piece:
        piece = self._alternatives()
        if self._at != len(self._text):
            raise ValueError(f"pattern {self._text!r}: cannot read it from character {self._at} on")
        return piece

    def _alternatives(self) -> Piece:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _either(branches)

    def _sequence(self) -> Piece:
        pieces, literals = [], []
        while self._peek() not in ("", "|", ")"):
            if found := _LITERAL.match(self._text, self._at):
                literals.append(re.sub(r"\\(.)", r"\1", found.group(), flags=re.DOTALL))
                pieces.append(_literal(literals[-1]))
            elif found := _RUN.match(self._text, self._at):
                pieces.append(_run(found["one"], least=int(found["times"] == "+")))
            else:
                pieces.append(self._repeated(self._atom()))
                continue
            self._at = found.end()
        return _then(pieces, literals)

    def _repeated(self, piece: Piece) -> Piece:
        found = _QUANTIFIER.match(self._text, self._at)
        if found is None or found.group() == "{}":  # plain characters to `re`
            return piece
        self._at = found.end()
        if self._peek() == "+":
            raise self._unsupported("a possessive repeat")
        if self._peek() == "?":  # lazy: matches the same names
            self._at += 1
        least, most = _counts(found)
        if max(least, most or 0) > MAX_REPEAT:
            raise self._unsupported(f"a repeat above {MAX_REPEAT}")
        return _repeat(piece, least, most)

    def _atom(self) -> Piece:
        text, at = self._text, self._at
        if text[at] == "(":
            return self._group()
        if text[at] in "^$":
            self._at += 1
            return _at_start if text[at] == "^" else _at_end
        for kind in (_ESCAPE, _CLASS):
            found = kind.match(text, at)
            if found is not None:
                self._at = found.end()
                return _character(found.group())
        if text[at] == "\\":
            raise self._unsupported(f"the escape {text[at : at + 2]!r}")
        self._at += 1
        return _character("." if text[at] == "." else re.escape(text[at]))

    def _group(self) -> Piece:
        self._at += 3 if self._text.startswith("(?:", self._at) else 1
        if self._peek() == "?":
            raise self._unsupported(f"the group {self._text[self._at - 1 : self._at + 2]!r}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._unsupported(f"more than {MAX_DEPTH} groups inside each other")
        piece = self._alternatives()
        self._depth -= 1
        self._at += 1  # the closing bracket
        return piece

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _unsupported(self, what: str) -> ValueError:
        return ValueError(f"pattern {self._text!r}: {what} is not supported")


def _counts(quantifier: re.Match[str]) -> tuple[int, int | None]:
    """The bounds of a repeat: the fewest and the most times; None: no limit."""
    text, least, comma, most = quantifier.group(0, 1, 2, 3)
    if text[0] != "{":
        return int(text == "+"), 1 if text == "?" else None
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else None


def _character(source: str) -> Piece:
    matches = re.compile(source).fullmatch

    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        return frozenset(i + 1 for i in starts if i < len(name) and matches(name[i]))

    return ends


def _literal(text: str) -> Piece:
    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        return frozenset(i + len(text) for i in starts if name.startswith(text, i))

    return ends


def _run(source: str, least: int) -> Piece:
    run = re.compile(f"{source}*").match  # which follows nothing else, and so is matched once

    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        reached: set[int] = set()
        last = -1
        for i in sorted(starts):
            if i > last and (found := run(name, i)):  # others begin within the run before, and lead nowhere new
                last = found.end()
                reached.update(range(i + least, last + 1))
        return frozenset(reached)

    return ends


def _at_start(name: str, starts: frozenset[int]) -> frozenset[int]:
    return starts & {0}


def _at_end(name: str, starts: frozenset[int]) -> frozenset[int]:
    return starts & {len(name)}


def _then(pieces: Sequence[Piece], literals: Sequence[str]) -> Piece:
    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        if any(text not in name for text in literals):  # most names are told apart so, and soon
            return frozenset()
        for piece in pieces:
            starts = piece(name, starts)
        return starts

    return ends


def _either(branches: Iterable[Piece]) -> Piece:
    branches = tuple(branches)

    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        return frozenset().union(*(branch(name, starts) for branch in branches))

    return ends


def _repeat(piece: Piece, least: int, most: int | None) -> Piece:
    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        for _ in range(least):
            before, starts = starts, piece(name, starts)
            if starts == before:
                break
        reached = frontier = starts
        rounds = len(name) if most is None else most - least
        for _ in range(rounds):
            frontier = piece(name, frontier) - reached  # a position once reached leads nowhere new
            if not frontier:
                break
            reached |= frontier
        return reached

    return ends
