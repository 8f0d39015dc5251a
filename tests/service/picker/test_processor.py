"""The conversation with Envoy, in each way in which it may hand over a body."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loraplex_service.picker.config import PickerConfig, ReplicasConfig
from loraplex_service.picker.envoy import (
    BUFFERED,
    BUFFERED_PARTIAL,
    FULL_DUPLEX,
    NO_BODY,
    STREAMED,
    ProcessingRequest,
    ProcessingResponse,
)
from loraplex_service.picker.page import Page
from loraplex_service.picker.policy import Health, Place
from loraplex_service.picker.processor import MAX_BODY, MAX_HELD, MAX_PIECES, Picker, Processor
from loraplex_service.picker.replicas import Replica

DESTINATION = "x-gateway-destination-endpoint"
PORTS = ReplicasConfig("replicas", http_port=8000)
CONFIG = PickerConfig(replicas=(PORTS,))


class KnownFleet:
    """Two replicas: the first has `poet` on its device, the second has `legal`."""

    def __init__(self) -> None:
        self.replicas = [self._replica("10.0.0.1", "poet"), self._replica("10.0.0.2", "legal")]

    def _replica(self, address: str, adapter: str) -> Replica:
        replica = Replica(address, PORTS, lambda: 1.0)
        replica.health = Health.SERVING
        replica.learn(Page(loaded={adapter: {"shared": Place.DEVICE}}, num_slots=4), 1.0)
        return replica


@pytest.fixture
def fleet() -> KnownFleet:
    return KnownFleet()


@pytest.fixture
def picker(fleet: KnownFleet) -> Picker:
    return Picker(CONFIG, fleet)  # type: ignore[arg-type]


def begin(mode: int = NO_BODY, *, ends: bool = False, subset: list[str] | None = None, **headers: str) -> Any:
    message = ProcessingRequest()
    message.request_headers.end_of_stream = ends
    for name, value in headers.items():
        message.request_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    message.protocol_config.request_body_mode = mode
    if subset is not None:
        space = message.metadata_context.filter_metadata.add(key="envoy.lb.subset_hint")
        space.value.update({f"{DESTINATION}-subset": subset})
    return message


def piece(body: bytes, *, ends: bool = False) -> Any:
    return ProcessingRequest(request_body={"body": body, "end_of_stream": ends})


async def answers(picker: Picker, *messages: Any) -> list[Any]:
    async def sent() -> AsyncIterator[Any]:
        for message in messages:
            yield message

    return [ProcessingResponse.FromString(a.SerializeToString()) async for a in Processor(picker).process(sent(), None)]


def endpoints(answer: Any) -> list[str]:
    """Those of an answer, which says them in both places alike."""
    mutation = getattr(answer, answer.WhichOneof("kind")).response.header_mutation
    [header] = mutation.set_headers
    value = header.header.raw_value.decode()
    assert header.header.key == DESTINATION
    assert answer.dynamic_metadata["envoy.lb"][DESTINATION] == value
    return value.split(",")


async def test_a_grpc_call_goes_to_the_replica_that_has_its_adapter(picker: Picker) -> None:
    [answer] = await answers(picker, begin(loraplex_adapter="legal", content_type="application/grpc"))
    assert endpoints(answer) == ["10.0.0.2:50051", "10.0.0.1:50051"]  # the second is for a retry


@pytest.mark.parametrize("mode", [BUFFERED, BUFFERED_PARTIAL])
async def test_a_body_that_comes_at_once_says_the_adapter(picker: Picker, mode: int) -> None:
    headers, body = await answers(
        picker, begin(mode, content_type="application/json"), piece(b'{"model": "legal"}', ends=True)
    )
    assert headers.request_headers.response.ByteSize() == 0
    assert endpoints(body)[0] == "10.0.0.2:8000"


async def test_a_body_in_pieces_is_given_back_behind_the_answer(picker: Picker) -> None:
    pieces = [b'{"messages": [], ', b'"model": "legal"', b"}"]
    messages = [piece(each, ends=each == b"}") for each in pieces]
    first, *rest = await answers(picker, begin(FULL_DUPLEX), *messages)
    assert first.WhichOneof("kind") == "request_headers"
    assert endpoints(first)[0] == "10.0.0.2:8000"
    given = [answer.request_body.response.body_mutation.streamed_response for answer in rest]
    assert [each.body for each in given] == pieces
    assert [each.end_of_stream for each in given] == [False, False, True]


async def test_what_comes_back_from_the_replica_passes_unchanged(picker: Picker) -> None:
    back = [
        ProcessingRequest(response_headers={}),
        ProcessingRequest(response_body={"body": b"token"}),
        ProcessingRequest(response_trailers={}),
    ]
    call = begin(FULL_DUPLEX, loraplex_adapter="legal", content_type="application/grpc")
    _, headers, body, trailers = await answers(picker, call, *back)
    assert headers.WhichOneof("kind") == "response_headers"
    assert body.response_body.response.body_mutation.streamed_response.body == b"token"
    assert trailers.WhichOneof("kind") == "response_trailers"


@pytest.mark.parametrize(
    "pieces",
    [[b"x" * MAX_BODY] * 2, [b"x"] * (2 * MAX_PIECES)],
    ids=["large ones", "many"],
)
async def test_a_body_without_end_is_not_waited_for(picker: Picker, pieces: list[bytes]) -> None:
    found = await answers(picker, begin(FULL_DUPLEX), *(piece(each) for each in pieces))
    assert len(found) == 1 + len(pieces)
    assert found[0].WhichOneof("kind") == "request_headers"
    assert len(endpoints(found[0])) == 2


@pytest.mark.parametrize("mode", [STREAMED, NO_BODY])
async def test_a_body_that_is_not_handed_over_is_not_waited_for(picker: Picker, mode: int) -> None:
    [answer] = await answers(picker, begin(mode), piece(b'{"model": "legal"}', ends=True))
    assert len(endpoints(answer)) == 2


async def test_a_header_spares_waiting_for_the_body(picker: Picker) -> None:
    [answer] = await answers(picker, begin(BUFFERED, loraplex_adapter="legal"), piece(b'{"model": "poet"}', ends=True))
    assert endpoints(answer)[0] == "10.0.0.2:8000"


async def test_a_subset_that_the_gateway_gives_is_kept_to(picker: Picker) -> None:
    call = begin(subset=["10.0.0.1:50051"], loraplex_adapter="legal", content_type="application/grpc")
    [answer] = await answers(picker, call)
    assert endpoints(answer) == ["10.0.0.1:50051"]


async def test_where_nothing_is_known_envoy_decides_and_no_caller_does(picker: Picker, fleet: KnownFleet) -> None:
    for replica in fleet.replicas:
        replica.health = Health.DEAD
    [answer] = await answers(picker, begin(loraplex_adapter="legal", x_gateway_destination_endpoint="6.6.6.6:80"))
    mutation = answer.request_headers.response.header_mutation
    assert (list(mutation.remove_headers), list(mutation.set_headers)) == ([DESTINATION], [])
    assert not answer.HasField("dynamic_metadata")


async def test_calls_for_a_cold_adapter_go_to_one_replica_while_it_is_loaded(picker: Picker) -> None:
    call = begin(loraplex_adapter="cold", content_type="application/grpc")
    chosen = [endpoints((await answers(picker, call))[0])[0] for _ in range(CONFIG.queue)]
    assert len(set(chosen)) == 1


async def test_a_hot_adapter_goes_to_more_replicas_once_many_wait_for_it(picker: Picker) -> None:
    call = begin(loraplex_adapter="legal", content_type="application/grpc")
    chosen = [endpoints((await answers(picker, call))[0])[0] for _ in range(100)]
    counts = Counter(chosen)
    assert chosen[0] == "10.0.0.2:50051"
    assert counts["10.0.0.2:50051"] >= counts["10.0.0.1:50051"] > 20


async def test_picks_are_counted_by_where_the_adapter_was(picker: Picker) -> None:
    for call in (begin(loraplex_adapter="legal"), begin(loraplex_adapter="cold"), begin()):
        await answers(picker, call)
    assert picker.picks == {"device": 1, "room": 1, "none": 1}


async def test_a_conversation_that_begins_with_something_else_ends(picker: Picker) -> None:
    assert await answers(picker, piece(b"x")) == []
    assert await answers(picker) == []


async def test_bodies_without_end_do_not_fill_the_memory_together(picker: Picker) -> None:
    """Past what all may hold, none is waited for."""
    processor, large = Processor(picker), b"x" * (MAX_BODY - 1)
    waits = asyncio.Event()

    async def sent() -> AsyncIterator[Any]:
        yield begin(FULL_DUPLEX)
        yield piece(large)
        await waits.wait()

    talks = [processor.process(sent(), None) for _ in range(MAX_HELD // len(large) + 3)]
    firsts = [asyncio.ensure_future(anext(talk)) for talk in talks]
    done, held = await asyncio.wait(firsts, return_when=asyncio.FIRST_COMPLETED)
    assert len(held) * len(large) <= MAX_HELD
    assert all(len(endpoints(first.result())) == 2 for first in done)
    for first in held:
        first.cancel()
    await asyncio.gather(*held, return_exceptions=True)


async def test_a_stream_that_says_nothing_ends(picker: Picker) -> None:
    async def silence() -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    assert [answer async for answer in Processor(picker, first_seconds=0.01).process(silence(), None)] == []
