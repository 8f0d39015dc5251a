"""Which tokens the forms of a step's requests allow: filled in while the device computes, and applied to the logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher

from loraplex_engine.execution import token_bits
from loraplex_engine.execution.arrays import History
from loraplex_engine.scheduling.form import NOTHING_FITS, Form

MAX_THREADS = 32


class TokenMask(NamedTuple):
    """The tokens that some rows may draw, and why others can draw none."""

    rows: list[int]
    bits: np.ndarray  # int32 [len(rows), W]: bit v % 32 of word v // 32 says whether token v is allowed
    problems: Mapping[int, str]  # by request id; all of the row's bits are 0


class FormMasks:
    """Fills the masks of all rows of a step with a form, on several threads where there are cores for them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @cached_property
    def _executor(self) -> LLExecutor | None:
        """Threads, which start with the first form; None: one would be all, and to wait for it takes longer."""
        num_threads = (os.cpu_count() or 1) - 1
        return LLExecutor(min(num_threads, MAX_THREADS)) if num_threads > 1 else None

    def fill(self, histories: Sequence[History], forms: Mapping[int, Form]) -> TokenMask:
        """The masks of the rows that have a form. forms: by row."""
        rows, given = list(forms), [histories[row] for row in forms]
        bits = np.zeros((len(rows), token_bits.width(self._vocab_size)), dtype=np.int32)
        octets = bits.view(np.uint8)
        self._let_go_on(bits, [form.matcher for form in forms.values()], given)
        self._let_end(octets.reshape(-1), given)
        for form, row_octets in zip(forms.values(), octets, strict=True):
            form.apply_words(row_octets)
        problems: dict[int, str] = {}
        drawable: Sequence[bool] = np.any(bits, axis=1).tolist()
        for place, (row, some) in enumerate(zip(rows, drawable, strict=True)):
            problem = forms[row].problem or ("" if some and _is_drawable(octets[place], given[place]) else NOTHING_FITS)
            if problem:
                bits[place] = 0
                problems.setdefault(given[place].request_id, f"its form cannot go on: {problem}")
        return TokenMask(rows, bits, problems)

    def _let_go_on(self, bits: np.ndarray, matchers: Sequence[LLMatcher | None], histories: Sequence[History]) -> None:
        """Allow the tokens that each grammar does; without a grammar, all."""
        places = [(matcher, place) for place, matcher in enumerate(matchers) if matcher is not None]
        free = [place for place, matcher in enumerate(matchers) if matcher is None]
        start, size = bits.ctypes.data, bits.strides[0]
        if places and self._executor is not None:
            self._executor.unsafe_compute_mask_ptr(places, start, size, len(bits))
        elif places:
            for matcher, place in places:
                matcher.unsafe_compute_mask_ptr(start + place * size, size)
        for place in free:
            count = histories[place].sampling.num_token_ids or self._vocab_size
            bits[place].view(np.uint8)[:] = token_bits.first_tokens(count, self._vocab_size)

    def _let_end(self, octets: np.ndarray, histories: Sequence[History]) -> None:
        """Allow the tokens that end an output where its form may end and it is not too early, and nowhere else.

        octets: of all rows, one behind the other
        """
        width = 32 * token_bits.width(self._vocab_size)
        ends = self._vocab_size + width * np.arange(len(histories))
        may_end = token_bits.holds(octets, ends).tolist()
        endings: list[int] = []
        allowed: list[int] = []
        for place, history in enumerate(histories):
            sampling = history.sampling
            is_early = history.num_output_tokens < sampling.min_tokens
            ending = [place * width + token for token in sampling.eos_token_ids]
            endings += ending
            if is_early:
                endings += [place * width + token for token in sampling.stop_token_ids]
            elif may_end[place]:
                allowed += ending
        token_bits.remove(octets, ends)
        token_bits.remove(octets, endings)
        token_bits.add(octets, allowed)


def _is_drawable(octets: np.ndarray, history: History) -> bool:
    allowed = history.sampling.allowed_token_ids
    return allowed is None or bool(token_bits.holds(octets, allowed).any())
