"""Drafts of speculative decoding, as a model is configured for them and as a request asks for them. Torch-free."""

from collections.abc import Iterator
from enum import StrEnum

import msgspec

MOST_DRAFTS = 32  # of a request in one step


class DraftKind(StrEnum):
    """Where drafts come from. The values are spelt in configurations."""

    NGRAM = "ngram"  # what followed the same tokens before, in the prompt or the output
    MODEL = "model"  # a smaller model


class DraftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The drafts of a model's requests, unless they ask for others."""

    kind: DraftKind
    tokens: int = 8  # at most so many of a request in one step
    model: str | None = None  # of kind model: a local directory, or a hub id, of a model with the same tokenizer
    revision: str | None = None  # the revision of a hub id: pin it

    @property
    def offered(self) -> "Drafts":
        """What requests have that do not ask for others."""
        return Drafts(self.kind, self.tokens)

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range."""
        if not 1 <= self.tokens <= MOST_DRAFTS:
            yield f"drafts.tokens {self.tokens} must be from 1 to {MOST_DRAFTS}"
        if self.kind is DraftKind.MODEL and not self.model:
            yield "drafts.model must name a directory or a hub id where drafts.kind is model"
        if self.kind is not DraftKind.MODEL and (self.model or self.revision):
            yield f"drafts.model and drafts.revision must be left out where drafts.kind is {self.kind}"


class Drafts(msgspec.Struct, array_like=True, frozen=True):
    """The drafts that a request may have, or those of a model's requests unless they ask for others."""

    kind: DraftKind = DraftKind.NGRAM
    most: int = 0  # in one step; 0: there are none

    def offers(self, kind: DraftKind) -> bool:
        """Whether requests may have drafts of this kind, where these are the model's."""
        return self.most > 0 and kind in (DraftKind.NGRAM, self.kind)


NO_DRAFTS = Drafts()
