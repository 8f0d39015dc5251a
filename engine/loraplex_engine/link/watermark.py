"""A watermark, as a request asks for it. Torch-free. The client's `loraplex.watermark` finds it again."""

import hashlib
from collections.abc import Sequence

import msgspec


class Watermark(msgspec.Struct, frozen=True):
    """Which tokens are made more likely, by how much. Source: Kirchenbauer et al., arXiv 2301.10226."""

    key: bytes
    gamma: float  # the probability with which a token is one of them
    delta: float  # what is added to their logits
    context_tokens: int  # before a token, which decide with the key whether it is one

    def __repr__(self) -> str:
        """Tell all but the key, which no log may have."""
        return f"Watermark(gamma={self.gamma}, delta={self.delta}, context_tokens={self.context_tokens})"

    def seed(self, context: Sequence[int]) -> int:
        """What decides, behind these tokens, which ones are green: see `Watermarks`."""
        packed = b"".join(token.to_bytes(8, "little", signed=True) for token in context)
        return int.from_bytes(hashlib.blake2b(packed, key=self.key, digest_size=8).digest(), "little")
