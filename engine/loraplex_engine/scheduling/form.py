"""The form that one output must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llguidance import LLMatcher


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


class Form:
    """What may follow the tokens that an output has so far: what its grammar allows, and no word that it must not
    have.
    """

    def __init__(self, matcher: LLMatcher | None, words: Words | None = None, tail: bytes = b"") -> None:
        """`matcher`: None: there is no grammar. `tail`: what matters to `words` of the text so far."""
        self.matcher = matcher
        self._words = words
        self._tail = tail

    def copy(self) -> Form:
        """The same form, for another output."""
        return Form(self.matcher and self.matcher.deep_copy(), self._words, self._tail)

    def take(self, token_id: int) -> bool:
        """Note the output's next token. Returns whether nothing but the end may follow it."""
        if self._words is not None:
            self._tail = self._words.after(self._tail, [token_id])
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
