"""Drafts of speculative decoding, as a model is configured for them and as a request asks for them. Torch-free."""

from collections.abc import Iterator
from enum import StrEnum
from typing import ClassVar

import msgspec

from loraplex_engine.link.bounds import Bounds, bound_problems

MOST_DRAFTS = 32  # of a request in one step


class DraftKind(StrEnum):
    """Where drafts come from. The values are spelt in configurations."""

    NGRAM = "ngram"  # what followed the same tokens before, in the prompt or the output
    MODEL = "model"  # a smaller model


class DraftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The drafts of a model's requests, unless they ask for others."""

    BOUNDS: ClassVar[dict[str, Bounds]] = {"tokens": Bounds(1, MOST_DRAFTS)}

    kind: DraftKind  # `ngram`: what followed the same tokens before; `model`: what a smaller model says
    tokens: int = 8  # at most so many of a request in one step
    # of kind `model`: a directory, a GGUF file or a hub id of a model with the same tokenizer
    model: str | None = None
    revision: str | None = None  # the revision of a hub id: set it, so that it does not change

    @property
    def offered(self) -> "Drafts":
        """What requests have that do not ask for others."""
        return Drafts(self.kind, self.tokens)

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range."""
        yield from (f"drafts.{problem}" for problem in bound_problems(self))
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
