"""Where drafts come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from loraplex_engine.drafting.ngram import NgramIndex
from loraplex_engine.scheduling.request import Request


class Costs(NamedTuple):
    """The seconds that a request's next drafts take to make."""

    first: float  # before there is any
    each: float


FREE = Costs(0.0, 0.0)
NEVER = Costs(math.inf, 0.0)


class Source(Protocol):
    """Guesses the tokens that follow."""

    is_free: ClassVar[bool]  # whether a guess takes no time to speak of

    def costs(self, request: Request, num_requests: int, token_seconds: float) -> Costs:
        """What drafts of this request cost, among so many requests. token_seconds: what a token costs without."""

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> dict[int, Sequence[int]]:
        """At most so many tokens that may follow each of these requests; by request id, as are the tokens."""

    def forget(self, request: Request) -> None:
        """Drop what is kept of a request, which may be nothing."""


class Ngrams(Source):
    """Drafts from the tokens of the requests themselves."""

    is_free = True

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}  # by request id

    def costs(self, request: Request, num_requests: int, token_seconds: float) -> Costs:
        return FREE

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> dict[int, Sequence[int]]:
        return {
            request_id: self._indexes.setdefault(request_id, NgramIndex()).continuation(request.token_ids, count)
            for request_id, (request, count) in wanted.items()
        }

    def forget(self, request: Request) -> None:
        self._indexes.pop(request.request_id, None)
