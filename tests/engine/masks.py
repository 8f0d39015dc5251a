"""Texts that go through the masks of a form, token by token, as if they were drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from loraplex_engine.execution import token_bits
from loraplex_engine.execution.arrays import NO_COUNTS, History
from loraplex_engine.execution.bad_words import TokenTexts
from loraplex_engine.execution.form_masks import FormMasks
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.form import Form, FormKey
from loraplex_engine.scheduling.forms import Vocabulary


class Masks:
    """What forms of one vocabulary allow."""

    def __init__(self, tokens: Sequence[bytes], eos: int) -> None:
        self.tokens = list(tokens)
        self.eos = eos
        self._vocabulary = Vocabulary(self.tokens, TokenTexts(self.tokens))
        self._masks = FormMasks(len(self.tokens))
        sampling = SamplingParams(seed=0, max_tokens=1 << 20, eos_token_ids=(eos,))
        self._history = History(1, sampling, 1, 1, NO_COUNTS)

    def form(self, grammar: str, words: Sequence[str] = ()) -> Form:
        return self._vocabulary.form(FormKey(grammar, tuple(words), (), ()))

    def octets(self, form: Form) -> np.ndarray:
        """The mask of what may follow, as in `token_bits`."""
        bits: np.ndarray = self._masks.fill([self._history], {0: form}).bits[0].view(np.uint8)
        return bits

    def takes(self, form: Form, text: bytes) -> bool:
        """Whether the text can be drawn as a whole, with the longest tokens, and can end there."""
        form = form.copy()
        is_over = False
        for token in self._longest(text):
            if is_over or not token_bits.holds(self.octets(form), [token])[0]:
                return False
            is_over = form.take(token)
        return is_over or bool(token_bits.holds(self.octets(form), [self.eos])[0])

    def drawn(self, form: Form, random: np.random.Generator, most: int) -> bytes | None:
        """A text of tokens drawn evenly from what each mask allows; None: it has no end within so many tokens."""
        form = form.copy()
        text = b""
        for _ in range(most):
            allowed = np.flatnonzero(np.unpackbits(self.octets(form), bitorder="little"))
            assert len(allowed), form.problem
            token = int(random.choice(allowed))
            if token == self.eos:
                return text
            text += self.tokens[token]
            if form.take(token):
                return text
        return None

    def _longest(self, text: bytes) -> Iterator[int]:
        found = {token: id_ for id_, token in enumerate(self.tokens) if token}
        longest = max(map(len, found))
        at = 0
        while at < len(text):
            size = next(size for size in range(longest, 0, -1) if text[at : at + size] in found)
            yield found[text[at : at + size]]
            at += size
