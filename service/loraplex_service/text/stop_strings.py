"""Finds the strings that end an output, however the text is cut into pieces."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraplex_service.text.errors import TextError


@dataclass(frozen=True, slots=True)
class StopResult:
    """The result of pushing one piece of text."""

    text: str  # may be sent on now
    matched: str | None = None  # the stop string that ended the output
    discarded: int = 0  # characters of this piece that came after the match


class _Node:
    """One state of the automaton: a prefix of some stop string."""

    __slots__ = ("depth", "fail", "match", "next")

    def __init__(self, depth: int) -> None:
        self.depth = depth  # length of the prefix
        self.next: dict[str, _Node] = {}
        self.fail: _Node = self  # the longest proper suffix of the prefix that is itself a prefix of a stop string
        self.match: str | None = None  # the longest stop string that ends here


class StopStrings:
    """Holds back text that could begin a stop string, and releases all other text at once.

    The output ends at the first character that completes a stop string, and where it completes several, the longest
    counts. So the result depends on the text alone, never on how tokens cut it, and nothing is generated to look ahead.

    One pass and constant work per character whatever the stop strings are: Aho and Corasick, CACM 18 (1975) 333-340.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """Raises TextError if a stop string is empty: it would match before the first character."""
        if "" in stops:
            raise TextError(f"stop string {list(stops).index('')} is empty. Remove it, or give it characters.")
        self._root = _automaton(stops)
        self._first_chars = frozenset(self._root.next)
        self._include_stop = include_stop
        self._node = self._root
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, may_end: bool = True) -> StopResult:
        """The part of the text seen so far that may be sent on. After a match everything is discarded.

        `may_end`: whether a stop string that ends in this piece counts; wherever it begins.
        """
        if self._matched is not None:
            return StopResult("", self._matched, len(text))
        root, node = self._root, self._node
        if node is root and self._first_chars.isdisjoint(text):
            return StopResult(text)
        for position, char in enumerate(text):
            while char not in node.next and node is not root:
                node = node.fail
            node = node.next.get(char, root)
            if node.match is not None and may_end:
                return self._end(node.match, text, position + 1)
        self._node = node
        seen = self._held + text
        free = len(seen) - node.depth
        self._held = seen[free:]
        return StopResult(seen[:free])

    def flush(self) -> str:
        """The text still held back, once no more text comes. Empty after a match."""
        held, self._held, self._node = self._held, "", self._root
        return held

    def _end(self, stop: str, text: str, end: int) -> StopResult:
        seen = self._held + text[:end]
        self._held, self._matched = "", stop
        return StopResult(seen if self._include_stop else seen.removesuffix(stop), stop, len(text) - end)


def _automaton(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(node.depth + 1))
        node.match = stop
    for node, char, child in _breadth_first(root):
        fail = node.fail
        while char not in fail.next and fail is not root:
            fail = fail.fail
        child.fail = root if node is root else fail.next.get(char, root)
        child.match = child.match or child.fail.match
    return root


def _breadth_first(root: _Node) -> Iterator[tuple[_Node, str, _Node]]:
    waiting = deque([root])
    while waiting:
        node = waiting.popleft()
        for char, child in node.next.items():
            yield node, char, child
            waiting.append(child)
