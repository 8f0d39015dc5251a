"""Envoy's external processing, answered: for each request, the replicas that it should be tried on."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, Final

from loraplex_service.picker.asked import DESTINATION, Asked, headers_of, model_of
from loraplex_service.picker.config import PickerConfig
from loraplex_service.picker.envoy import (
    FULL_DUPLEX,
    NO_BODY,
    OVERWRITE,
    STREAMED,
    ProcessingResponse,
)
from loraplex_service.picker.policy import Standing, ranked
from loraplex_service.picker.replicas import Fleet, Replica

NAMESPACE: Final = "envoy.lb"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
FIRST_SECONDS: Final = 10.0  # for which a stream may be silent at its beginning
MAX_ENDPOINTS: Final = 3  # that are named: the first, and what retries are for
MAX_BODY: Final = 256 << 10  # of a body that is waited for, to find `model` in it
MAX_PIECES: Final = 64  # in which it may come
MAX_HELD: Final = 64 << 20  # of all of them


class Picker:
    """Chooses among the replicas, and keeps account of what it chose."""

    def __init__(self, config: PickerConfig, fleet: Fleet) -> None:
        self.picks = Counter[str]()  # by where the adapter was: a Place, "none" without an adapter, "unknown"
        self._config = config
        self._fleet = fleet

    def pick(self, asked: Asked, subset: frozenset[str] | None = None) -> list[str]:
        """The endpoints to try, in this order; empty: nothing is known. `subset`: those alone; None: any."""
        found: dict[str, tuple[Replica, Standing]] = {}
        for replica in self._fleet.replicas:
            endpoint = replica.endpoint(asked.is_grpc)
            if endpoint is not None and (subset is None or endpoint in subset):
                found[endpoint] = replica, replica.standing(asked, endpoint, self._config.stale_seconds)
        standings = [standing for _, standing in found.values()]
        best = ranked(standings, asked.key, self._config.queue, self._config.balance_factor)
        self.picks[_outcome(asked, best)] += 1
        if best:
            found[best[0].endpoint][0].give(asked)
        return [standing.endpoint for standing in best[:MAX_ENDPOINTS]]


class Processor:
    """Serves the method Process: one stream for each request that Envoy has."""

    def __init__(self, picker: Picker, first_seconds: float = FIRST_SECONDS) -> None:
        self._picker = picker
        self._first_seconds = first_seconds
        self._held = 0

    async def process(self, messages: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        """Answer each message of Envoy's. The stream ends, and Envoy goes on alone, once nothing more is to be said."""
        first = await self._first(messages)
        if first is None or first.WhichOneof("kind") != "request_headers":
            return
        mode = first.protocol_config.request_body_mode
        asked = Asked.from_headers(headers_of(first.request_headers.headers.headers))
        subset = _subset(first.metadata_context)
        has_body = not first.request_headers.end_of_stream and mode not in (NO_BODY, STREAMED)
        if has_body and not asked.is_named and not asked.is_grpc:
            async for answer in self._from_body(messages, asked, subset, mode == FULL_DUPLEX):
                yield answer
        else:
            yield _chosen("request_headers", self._picker.pick(asked, subset))
        if mode == FULL_DUPLEX:
            async for message in messages:
                yield _passed(message)

    async def _first(self, messages: AsyncIterator[Any]) -> Any:
        """The first message; None: there is none. Envoy sends it with the call: streams without are somebody else's."""
        try:
            async with asyncio.timeout(self._first_seconds):
                return await anext(messages, None)
        except TimeoutError:
            return None

    async def _from_body(
        self, messages: AsyncIterator[Any], asked: Asked, subset: frozenset[str] | None, is_duplex: bool
    ) -> AsyncGenerator[Any, None]:
        """Choose once the body says what is wanted. With `is_duplex` it comes in pieces, which are to be given back."""
        if not is_duplex:
            yield ProcessingResponse(request_headers={})  # the body comes behind this
        pieces: list[Any] = []
        held = 0
        try:
            async for message in messages:
                pieces.append(message)
                held += len(message.request_body.body)
                self._held += len(message.request_body.body)
                if not is_duplex or self._is_enough(pieces, held):
                    break
        finally:
            self._held -= held
        chosen = self._picker.pick(asked.with_model(_model(pieces)), subset)
        yield _chosen("request_headers" if is_duplex else "request_body", chosen)
        if is_duplex:
            for message in pieces:
                yield _passed(message)

    def _is_enough(self, pieces: Sequence[Any], held: int) -> bool:
        """Whether to choose now. The name is mostly in the first piece, and is looked for once more at the end."""
        last = pieces[-1]
        has_ended = last.WhichOneof("kind") != "request_body" or last.request_body.end_of_stream
        is_too_much = held >= MAX_BODY or self._held >= MAX_HELD or len(pieces) >= MAX_PIECES
        return has_ended or is_too_much or (len(pieces) == 1 and _model(pieces) != "")


def _model(pieces: Iterable[Any]) -> str:
    return model_of(b"".join(piece.request_body.body for piece in pieces)[:MAX_BODY])


def _outcome(asked: Asked, best: Sequence[Standing]) -> str:
    if not best:
        return "unknown"
    return best[0].place.name.lower() if asked.adapters else "none"


def _chosen(kind: str, endpoints: Sequence[str]) -> Any:
    """The answer with the endpoints, in a header and in dynamic metadata; what a caller sent there is removed."""
    answer = ProcessingResponse()
    mutation = getattr(answer, kind).response.header_mutation
    if not endpoints:
        mutation.remove_headers.append(DESTINATION)
        return answer
    value = ",".join(endpoints)
    option = mutation.set_headers.add(append_action=OVERWRITE)
    option.header.key, option.header.raw_value = DESTINATION, value.encode()
    answer.dynamic_metadata.update({NAMESPACE: {DESTINATION: value}})
    return answer


def _passed(message: Any) -> Any:
    """The answer to a message of which nothing is changed. Pieces of bodies are given back."""
    kind = message.WhichOneof("kind")
    answer = ProcessingResponse()
    getattr(answer, kind).SetInParent()
    if kind.endswith("_body"):
        piece = getattr(message, kind)
        streamed = getattr(answer, kind).response.body_mutation.streamed_response
        streamed.body, streamed.end_of_stream = piece.body, piece.end_of_stream
    return answer


def _subset(metadata: Any) -> frozenset[str] | None:
    """The endpoints to which the gateway limits the choice; None: it does not."""
    for space in metadata.filter_metadata:
        if space.key == SUBSET_NAMESPACE and SUBSET in space.value.fields:
            return frozenset(each.string_value for each in space.value.fields[SUBSET].list_value.values)
    return None
