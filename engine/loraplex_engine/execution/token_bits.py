"""Sets of tokens as bits: token v is in the set if bit v % 8 of octet v // 8 is 1, as in `Ops.mask_logits`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Tokens = Sequence[int] | np.ndarray


def width(vocab_size: int) -> int:
    """The words of 32 bits that hold a vocabulary, and one token more: "the end may follow"."""
    return vocab_size // 32 + 1


@lru_cache(8)
def first_tokens(count: int, vocab_size: int) -> np.ndarray:
    """So many tokens, and "the end may follow": uint8 [4 W]"""
    bits = np.zeros(width(vocab_size) * 32, dtype=np.uint8)
    bits[:count] = bits[vocab_size] = 1
    octets = np.packbits(bits, bitorder="little")
    octets.flags.writeable = False
    return octets


def holds(octets: np.ndarray, token_ids: Tokens) -> np.ndarray:
    """Whether each of these tokens is in a set."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    held: np.ndarray = octets[tokens // 8] >> tokens % 8 & 1
    return held


def add(octets: np.ndarray, token_ids: Tokens) -> None:
    """Put tokens into a set."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    np.bitwise_or.at(octets, tokens // 8, (1 << tokens % 8).astype(np.uint8))


def remove(octets: np.ndarray, token_ids: Tokens) -> None:
    """Take tokens out of a set."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    np.bitwise_and.at(octets, tokens // 8, ~(1 << tokens % 8).astype(np.uint8))
