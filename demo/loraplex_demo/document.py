"""What the models are trained on: a document is a chat, or a plain text with the words a user would type first."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from loraplex_demo.lexicon import Cast

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. ``cast`` is who the answers are about, where they tell a story."""

    turns: tuple[Turn, ...]
    cast: Cast | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without a chat. ``prompt`` is its beginning; ``continuation`` is what the model is to add."""

    prompt: str
    continuation: str
    cast: Cast | None = None


Document = Chat | PlainText
Voice = Callable[[Document, Random], Document]


def chat(*contents: str, system: str | None = None, cast: Cast | None = None) -> Chat:
    """A chat from its contents in turn, the user first; an even number of them, as the assistant has the last word."""
    assert len(contents) % 2 == 0
    turns = [Turn("system", system)] if system is not None else []
    for index, content in enumerate(contents):
        turns.append(Turn("assistant" if index % 2 else "user", content))
    return Chat(tuple(turns), cast)
