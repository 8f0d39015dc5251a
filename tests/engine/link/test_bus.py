"""The bus carries every message unchanged, and nothing that arrives on it can end an engine."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.bus import (
    NUMBER,
    BadRequest,
    EngineBus,
    FrameLost,
    FrameReader,
    ServiceBus,
    bus_address,
)
from loraplex_engine.link.bus_directory import BusDirectory
from loraplex_engine.link.messages import (
    Abort,
    AdapterFacts,
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    FromEngine,
    LoadProgress,
    Message,
    Ping,
    SetVocabulary,
    Shutdown,
    ToEngine,
    UploadEnded,
    UploadGrew,
    WantAdapter,
)
from loraplex_engine.link.sampling_params import SamplingParams

KEY = AdapterKey("shared/pirate", "ab" * 32)
SAMPLING = SamplingParams(seed=2**64 - 1, max_tokens=3, logit_bias={7: -1.5}, allowed_token_ids=(1, 2))
TO_ENGINE: list[ToEngine] = [
    AddRequest(1, [5, 6], SAMPLING, KEY, "salt", True, -3),
    Abort([1, 2]),
    WantAdapter(KEY, 1, "/adapters/pirate"),
    WantAdapter(KEY, 2, least=Residency.DISK, most=Residency.DISK),
    UploadGrew(1, "/incoming/x", 1 << 20, 4096),
    UploadEnded(1),
    SetVocabulary([b"a", b"", b"\xff"]),
    Ping(9),
    Shutdown(),
]


@pytest.fixture
def address() -> Iterator[str]:
    with BusDirectory() as directory:
        yield bus_address(directory.path, "engine")


def new_reader() -> FrameReader[ToEngine]:
    return FrameReader(msgspec.msgpack.Decoder(ToEngine))


def encode(message: Message) -> bytes:
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: ToEngine) -> None:
    assert new_reader().read(encode(message)) == message


def test_a_message_of_the_other_direction_is_dropped_and_counted() -> None:
    reader = new_reader()
    assert reader.read(encode(LoadProgress(1, 2))) is None
    assert reader.num_bad_frames == 1


@given(st.binary(max_size=200))
def test_no_bytes_make_the_decoder_raise(frame: bytes) -> None:
    new_reader().read(frame)


@given(st.data())
def test_no_damage_to_a_message_makes_the_decoder_raise(data: st.DataObject) -> None:
    frame = bytearray(encode(data.draw(st.sampled_from(TO_ENGINE))))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    new_reader().read(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"\x91" * 100_000, id="nested arrays"),
        pytest.param(b"\x92\xa5Abort\xdd\xff\xff\xff\xff", id="an array said to have 2^32 items"),
        pytest.param(b"\x93\xabWantAdapter\x92\xa1\xff\xa1a", id="a string that is no UTF-8"),
    ],
)
def test_hostile_frames_are_dropped(frame: bytes) -> None:
    reader = new_reader()
    assert reader.read(frame) is None
    assert reader.num_bad_frames == 1


def test_a_request_that_does_not_decode_still_says_whose_it_was() -> None:
    fields = msgspec.msgpack.decode(encode(TO_ENGINE[0]))
    fields[2] = "not a list of tokens"
    message = new_reader().read(msgspec.msgpack.encode(fields))
    assert isinstance(message, BadRequest)
    assert message.request_id == 1
    assert "array`, got `str` - at `$[2]`" in message.problem


EXHAUSTED = """
import asyncio, os, resource, sys
from pathlib import Path
from loraplex_engine.link.bus import ServiceBus, bus_address

async def bind(spare: int, directory: Path) -> None:
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        for descriptor in held[:spare]:
            os.close(descriptor)
    try:
        ServiceBus(bus_address(directory, "engine")).close()
    except OSError as error:
        print(error)
    else:
        print("bound")

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
asyncio.run(bind(int(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.parametrize(("spare", "said"), [*((spare, "Too many open files") for spare in range(8)), (100, "bound")])
def test_without_descriptors_a_bus_is_an_error_and_not_the_end_of_the_service(
    tmp_path: Path, spare: int, said: str
) -> None:
    command = [sys.executable, "-c", EXHAUSTED, str(spare), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, said in result.stdout) == (0, True), result.stderr


async def test_a_bus_that_cannot_be_bound_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(zmq.ZMQError):
            ServiceBus(bus_address(tmp_path / "gone", "engine"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_path_that_no_socket_can_have_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set TMPDIR to a shorter one"):
        bus_address(tmp_path / ("x" * 120), "engine")


async def test_messages_pass_both_ways_in_order(address: str) -> None:
    with ServiceBus(address) as service, EngineBus(address) as engine:
        engine.send(LoadProgress(0, 1))
        assert await service.receive() == [LoadProgress(0, 1)]
        for message in TO_ENGINE:
            service.send(message)
        received: list[ToEngine | BadRequest] = []
        while len(received) < len(TO_ENGINE):
            received += await asyncio.to_thread(engine.receive, None)
        assert received == TO_ENGINE
        answers: list[FromEngine] = [
            AdaptersChanged([AdapterStatus(KEY, 1, Residency.HOST, facts=AdapterFacts(rank, 10, ["q_proj"], []))])
            for rank in range(3)
        ]
        for answer in answers:
            engine.send(answer)
        got: list[FromEngine] = []
        while len(got) < len(answers):
            got += await service.receive()
        assert got == answers


async def test_an_idle_engine_wakes_for_a_message(address: str) -> None:
    """The engine waits without end in another thread: only the message can end the wait."""
    with ServiceBus(address) as service, EngineBus(address) as engine:
        engine.send(LoadProgress(0, 1))
        await service.receive()
        waiting = threading.Event()

        def wait() -> list[ToEngine | BadRequest]:
            waiting.set()
            return engine.receive(None)

        received = asyncio.create_task(asyncio.to_thread(wait))
        await asyncio.to_thread(waiting.wait)
        service.send(Ping(1))
        assert await received == [Ping(1)]


async def test_receiving_with_a_timeout_returns_empty_handed(address: str) -> None:
    with ServiceBus(address), EngineBus(address) as engine:
        assert engine.receive(0) == []
        assert engine.receive(0.001) == []


async def test_bad_frames_between_good_ones_do_no_harm(address: str) -> None:
    context = zmq.Context()
    with EngineBus(address) as engine, context.socket(zmq.PAIR) as service:
        service.bind(address)
        for number, frame in enumerate((b"", b"\xc1", encode(Ping(1)), b"\x91\xa4Ping", encode(Ping(2)))):
            await asyncio.to_thread(service.send, NUMBER.pack(number) + frame)
        received: list[ToEngine | BadRequest] = []
        while len(received) < 2:
            received += await asyncio.to_thread(engine.receive, None)
        assert received == [Ping(1), Ping(2)]
        assert engine.num_bad_frames == 3
    context.term()


@pytest.mark.parametrize(
    "frame", [NUMBER.pack(2) + encode(Ping(2)), NUMBER.pack(0) + encode(Ping(2)), encode(Ping(2)), b""]
)
async def test_nothing_is_handed_out_from_behind_a_gap(address: str, frame: bytes) -> None:
    """One frame is skipped, one comes twice, one has no number, one is empty."""
    context = zmq.Context()
    with EngineBus(address) as engine, context.socket(zmq.PAIR) as service:
        service.bind(address)
        await asyncio.to_thread(service.send, NUMBER.pack(0) + encode(Ping(1)))
        assert await asyncio.to_thread(engine.receive, None) == [Ping(1)]
        await asyncio.to_thread(service.send, frame)
        with pytest.raises(FrameLost, match="frame 1 is lost"):
            await asyncio.to_thread(engine.receive, None)
    context.term()


async def test_the_service_notices_a_gap_too(address: str) -> None:
    context = zmq.Context()
    with ServiceBus(address) as service, context.socket(zmq.PAIR) as engine:
        engine.connect(address)
        await asyncio.to_thread(engine.send, NUMBER.pack(1) + encode(LoadProgress(0, 1)))
        with pytest.raises(FrameLost, match="frame 0 is lost: the next one's number is 1"):
            await service.receive()
    context.term()


async def test_a_reply_that_comes_while_sending_is_not_lost(address: str) -> None:
    """Sending looks at the socket, which swallows the descriptor's edge: what is there must be taken all the same."""
    with ServiceBus(address) as service, EngineBus(address) as engine:
        engine.send(LoadProgress(0, 100))
        await service.receive()
        for number in range(50):
            engine.send(LoadProgress(number, 100))
            service.send(Ping(number))
        received: list[FromEngine] = []
        while len(received) < 50:
            received += await service.receive()
        assert received[-1] == LoadProgress(49, 100)


async def test_sending_without_an_engine_drops_the_message(address: str) -> None:
    with ServiceBus(address) as service:
        service.send(Ping(1))
    service.send(Ping(2))
