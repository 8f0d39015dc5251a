"""Which tokens the forms of a step's requests allow: filled in while the device computes, and applied to the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor

from loraplex_engine.execution import token_bits
from loraplex_engine.execution.arrays import History
from loraplex_engine.scheduling.form import Form

NOTHING_FITS = "no token is left to draw: loosen allowed_token_ids, bad_words or min_tokens, or the form"


class TokenMask(NamedTuple):
    """The tokens that some rows may draw, and why others can draw none."""

    rows: list[int]
    bits: np.ndarray  # int32 [len(rows), W]: bit v % 32 of word v // 32 says whether token v is allowed
    problems: Mapping[int, str]  # by request id; all of the row's bits are 0


class FormMasks:
    """Fills the masks of all rows of a step with a form, on several threads."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()  # its threads start with the first form

    def fill(self, histories: Sequence[History], forms: Mapping[int, Form]) -> TokenMask:
        """The masks of the rows that have a form. forms: by row."""
        rows = list(forms)
        bits = np.zeros((len(rows), token_bits.width(self._vocab_size)), dtype=np.int32)
        matchers = [(form.matcher, place) for place, form in enumerate(forms.values()) if form.matcher is not None]
        if matchers:
            self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, bits.strides[0], len(rows))
        problems: dict[int, str] = {}
        for row, octets in zip(rows, bits.view(np.uint8), strict=True):
            history = histories[row]
            problem = forms[row].problem or self._apply(forms[row], octets, history)
            if problem:
                octets[:] = 0
                problems.setdefault(history.request_id, f"its form cannot go on: {problem}")
        return TokenMask(rows, bits, problems)

    def _apply(self, form: Form, octets: np.ndarray, history: History) -> str:
        """Apply to what a form's grammar allows all else that has a say. Returns why no token is left, or ""."""
        sampling = history.sampling
        if form.matcher is None:
            octets[:] = token_bits.first_tokens(sampling.num_token_ids or self._vocab_size, self._vocab_size)
        self._let_end(octets, history)
        form.apply_words(octets)
        allowed = sampling.allowed_token_ids
        return "" if (octets if allowed is None else token_bits.holds(octets, allowed)).any() else NOTHING_FITS

    def _let_end(self, octets: np.ndarray, history: History) -> None:
        """Allow the tokens that end the output where the form may end and it is not too early, and nowhere else."""
        sampling = history.sampling
        may_end = token_bits.holds(octets, [self._vocab_size])[0]
        is_early = history.num_output_tokens < sampling.min_tokens
        endings = (*sampling.eos_token_ids, *(sampling.stop_token_ids if is_early else ()))
        token_bits.remove(octets, [self._vocab_size, *endings])
        if may_end and not is_early:
            token_bits.add(octets, sampling.eos_token_ids)
