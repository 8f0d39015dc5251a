"""Which tokens the forms of a step's requests allow: filled in while the device computes, and applied to the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor

from loraplex_engine.execution.arrays import History
from loraplex_engine.scheduling.form import Form

NOTHING_FITS = "no token that it may draw can go on its form: loosen allowed_token_ids or min_tokens, or the form"


class TokenMask(NamedTuple):
    """The tokens that some rows may draw, and why others can draw none."""

    rows: list[int]
    bits: np.ndarray  # int32 [len(rows), W]: bit v % 32 of word v // 32 says whether token v is allowed
    problems: Mapping[int, str]  # by request id; all of the row's bits are 0


class FormMasks:
    """Fills the masks of all rows of a step with a form, on several threads."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._width = vocab_size // 32 + 1  # one token more than the vocabulary has: "the end may follow"

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()  # its threads start with the first form

    def fill(self, histories: Sequence[History], forms: Mapping[int, Form]) -> TokenMask:
        """The masks of the rows that have a form. forms: by row."""
        rows = list(forms)
        bits = np.zeros((len(rows), self._width), dtype=np.int32)
        places = [(form.matcher, place) for place, form in enumerate(forms.values())]
        self._executor.unsafe_compute_mask_ptr(places, bits.ctypes.data, bits.strides[0], len(rows))
        problems: dict[int, str] = {}
        for row, row_bits in zip(rows, bits, strict=True):
            history = histories[row]
            problem = forms[row].problem
            if not problem:
                self._let_end(row_bits, history)
                problem = "" if self._is_drawable(row_bits, history) else NOTHING_FITS
            if problem:
                row_bits[:] = 0
                problems.setdefault(history.request_id, f"its form cannot go on: {problem}")
        return TokenMask(rows, bits, problems)

    def _let_end(self, bits: np.ndarray, history: History) -> None:
        """Allow the tokens that end the output where the form may end and it is not too early, and nowhere else."""
        sampling = history.sampling
        octets = bits.view(np.uint8)
        may_end = _holds(octets, np.array([self._vocab_size]))[0]
        is_early = history.num_output_tokens < sampling.min_tokens
        _forbid(octets, [self._vocab_size, *sampling.eos_token_ids, *(sampling.stop_token_ids if is_early else ())])
        if may_end and not is_early:
            ends = np.array(sampling.eos_token_ids, dtype=np.int64)
            np.bitwise_or.at(octets, ends // 8, (1 << ends % 8).astype(np.uint8))

    def _is_drawable(self, bits: np.ndarray, history: History) -> bool:
        allowed = history.sampling.allowed_token_ids
        if allowed is None:
            return bool(bits.any())
        return bool(_holds(bits.view(np.uint8), np.array(allowed)).any())


def _holds(octets: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Whether each of these tokens is allowed."""
    held: np.ndarray = octets[token_ids // 8] >> token_ids % 8 & 1
    return held


def _forbid(octets: np.ndarray, token_ids: Sequence[int]) -> None:
    tokens = np.array(token_ids, dtype=np.int64)
    np.bitwise_and.at(octets, tokens // 8, ~(1 << tokens % 8).astype(np.uint8))
