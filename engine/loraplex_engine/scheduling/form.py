"""The form that one output must have, and the texts that end it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Final, NamedTuple, Protocol

from llguidance import LLMatcher

NOTHING_FITS: Final = "no token is left to draw: loosen allowed_token_ids, bad_words or min_tokens, or the form"


class FormKey(NamedTuple):
    """What a form is made of."""

    grammar: str  # "": none
    bad_words: tuple[str, ...]
    stop: tuple[str, ...]
    token_ids: tuple[int, ...]  # taken already


class Words(Protocol):
    """Words that an output must not have, whichever tokens spell them."""

    def after(self, tail: bytes, token_ids: Sequence[int]) -> bytes:
        """What matters of a text after these tokens. tail: what mattered of it before them; empty: it was empty."""

    def apply(self, octets: Any, tail: bytes) -> None:
        """Take what would complete a word behind a text out of a set of tokens: an array of bits."""


class Texts(Protocol):
    """The texts of a vocabulary's tokens."""

    def without(self, words: Sequence[bytes]) -> Words:
        """What texts without these words need, of which none is empty. Takes some milliseconds a word."""


class Stops:
    """Texts that end an output, whichever tokens spell them."""

    def __init__(self, texts: Sequence[bytes], token_bytes: Sequence[bytes]) -> None:
        """`texts`: none is empty. `token_bytes`: by id."""
        self._texts = texts
        self._token_bytes = token_bytes
        self._num_kept = max(map(len, texts)) - 1

    def after(self, tail: bytes, token_id: int) -> tuple[bytes, bool]:
        """What matters of a text after one more token, and whether that completes one of the texts.

        tail: what mattered of it before; empty: it was empty.
        """
        text = tail + self._token_bytes[token_id]
        completed = any(text.find(stop, max(len(tail) - len(stop) + 1, 0)) >= 0 for stop in self._texts)
        return text[max(len(text) - self._num_kept, 0) :], completed


class Form:
    """What may follow the tokens that an output has so far: what its grammar allows, and no word that it must not
    have. The sequences of a search are told of texts that end them, too: of others the service finds these.
    """

    def __init__(self, matcher: LLMatcher | None, words: Words | None = None, stops: Stops | None = None) -> None:
        """`matcher`: None: there is no grammar."""
        self.matcher = matcher
        self.completes_stop = False  # whether its last token completes a text that ends it
        self._words = words
        self._stops = stops
        self._tail = self._stop_tail = b""  # what matters to `words`, and to `stops`, of the text so far

    def copy(self) -> Form:
        """The same form, for another output."""
        twin = copy(self)
        twin.matcher = self.matcher and self.matcher.deep_copy()
        return twin

    def take(self, token_id: int) -> bool:
        """Note the output's next token. Returns whether nothing but the end may follow it."""
        if self._words is not None:
            self._tail = self._words.after(self._tail, [token_id])
        if self._stops is not None:
            self._stop_tail, self.completes_stop = self._stops.after(self._stop_tail, token_id)
        return self.matcher is not None and self.matcher.consume_token(token_id) and self.matcher.is_stopped()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens its grammar lets follow, one after the other."""
        return len(token_ids) if self.matcher is None else int(self.matcher.validate_tokens(list(token_ids)))

    def after(self, token_id: int) -> Form | None:
        """The form after one more token, which the output may never have; None: nothing of it can follow that."""
        form = self.copy()
        return None if form.take(token_id) or form.problem else form

    def apply_words(self, octets: Any) -> None:
        """Take what would complete a word that the output must not have out of a set of tokens: an array of bits."""
        if self._words is not None:
            self._words.apply(octets, self._tail)

    @property
    def problem(self) -> str:
        """Why the form cannot go on; "": it can."""
        if self.matcher is None or not self.matcher.is_error():
            return ""
        problem = self.matcher.get_error().removesuffix("\n<non-verbose/>")
        return "no text can complete it" if problem == "NoExtensionBias" else problem
