"""The watermark of outputs: what asks for it, and what finds it again in tokens, with the key and nothing else."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraplex.v1 import generation_pb2

WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Detection:
    """What a detector found in some tokens."""

    num_scored: int
    """Tokens that were looked at: those behind enough others, each combination once."""
    num_green: int
    """Of these, green ones."""
    z: float
    """How many standard deviations this is above what tokens without the watermark have."""
    p_value: float
    """The probability of at least so many green tokens without the watermark."""


@dataclass(frozen=True)
class Watermark:
    """A watermark that makes some tokens, the green ones, more likely: which ones they are, only its key tells.

    Source: Kirchenbauer et al., A Watermark for Large Language Models, arXiv 2301.10226. A token is green with
    probability `gamma`, by a keyed hash of itself and the tokens before it, instead of by a permutation of the
    vocabulary, so that a detector needs no vocabulary.
    """

    key: bytes = field(repr=False)
    """Secret, from 16 to 64 bytes."""
    gamma: float = 0.25
    """Share of the tokens that are green."""
    delta: float = 2.0
    """Amount that is added to the logits of green tokens."""
    context_tokens: int = 1
    """Tokens before a token that decide, with the key, whether it is green."""

    def message(self) -> generation_pb2.Watermark:
        """Build the message of the contract."""
        return generation_pb2.Watermark(
            key=self.key, gamma=self.gamma, delta=self.delta, context_tokens=self.context_tokens
        )

    def is_green(self, context: Sequence[int], token_id: int) -> bool:
        """Say whether a token is green behind others, of which the last `context_tokens` count."""
        before = context[-self.context_tokens :] if self.context_tokens else ()
        packed = b"".join(token.to_bytes(8, "little", signed=True) for token in before)
        seed = int.from_bytes(hashlib.blake2b(packed, key=self.key, digest_size=8).digest(), "little")
        return _mixed((seed + (token_id + 1) * 0x9E3779B97F4A7C15) & WORD) >> 11 < int(self.gamma * (1 << 53))

    def detect(self, token_ids: Sequence[int]) -> Detection:
        """Look for the watermark in the tokens of an output, or of any text. A z above 4 is hardly chance."""
        count = self.context_tokens
        runs = {tuple(token_ids[end - count : end + 1]) for end in range(count, len(token_ids))}
        num_green = sum(self.is_green(run[:-1], run[-1]) for run in runs)
        deviation = math.sqrt(len(runs) * self.gamma * (1 - self.gamma))
        z = (num_green - self.gamma * len(runs)) / deviation if runs else 0.0
        return Detection(len(runs), num_green, z, math.erfc(z / math.sqrt(2)) / 2)


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators"."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)
