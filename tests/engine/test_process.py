"""The loop around a core whose every move can be checked by hand."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import zmq

from loraplex_adapters.errors import INVALID
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.bus import NUMBER, EngineBus, bus_address
from loraplex_engine.link.bus_directory import BusDirectory
from loraplex_engine.link.child import limit_threads
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.messages import (
    Abort,
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    Device,
    EngineFailed,
    EngineLimits,
    EngineReady,
    EngineStats,
    FromEngine,
    LoadProgress,
    LoadWaits,
    Ping,
    Pong,
    RequestOutput,
    SetVocabulary,
    Shutdown,
    StepOutput,
    ToEngine,
    UploadEnded,
    UploadGrew,
    WantAdapter,
)
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.process import WAITS_SECONDS, Core, SentReport, run_engine
from tests.waits import MOST_SECONDS

KEY = AdapterKey("shared/pirate", "ab" * 32)
LIMITS = EngineLimits("Fake", "float32", "", 100, 64, 8, 4, 10, 16, 1000, 2000, "fake", Device("cpu", "fake", 1))


class FakeCore:
    """Each step gives every request its next number, and finishes it after as many as it asked for."""

    def __init__(self) -> None:
        self.limits = LIMITS
        self.requests: dict[int, AddRequest] = {}
        self.given: dict[int, int] = {}
        self.events: list[FromEngine] = []
        self.unloaded: list[AdapterKey] = []
        self.idle_steps_left = 0
        self.step_error: Exception | None = None
        self.closed = False
        self.uploads_ended: list[int] = []

    def add(self, message: AddRequest) -> None:
        if not message.prompt_token_ids:
            raise ValueError("the prompt is empty")
        self.requests[message.request_id] = message

    def set_vocabulary(self, message: SetVocabulary) -> None:
        pass

    def abort(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def want_adapter(self, wish: WantAdapter) -> None:
        if wish.most is Residency.DISK:
            self.unloaded.append(wish.key)
            return
        if wish.path == "":
            raise ValueError("no path")
        self.idle_steps_left = 2  # read by a thread of its own, as it were
        self.events.append(AdaptersChanged([AdapterStatus(wish.key, wish.order, Residency.HOST)]))

    def note_upload(self, news: UploadGrew | UploadEnded) -> None:
        if isinstance(news, UploadGrew):
            raise RuntimeError("can't start new thread")
        self.uploads_ended.append(news.upload)

    def has_work(self) -> bool:
        return bool(self.requests or self.events)

    def step(self) -> list[FromEngine]:
        if self.step_error is not None:
            raise self.step_error
        if self.idle_steps_left:
            self.idle_steps_left -= 1
            return []
        events, self.events = self.events, []
        outputs = [self._next(request) for request in list(self.requests.values())]
        return [*events, StepOutput(outputs, self.stats())] if outputs else events

    def _next(self, request: AddRequest) -> RequestOutput:
        number = self.given[request.request_id] = self.given.get(request.request_id, 0) + 1
        finished = number == request.sampling.max_tokens
        if finished:
            del self.requests[request.request_id]
        return RequestOutput(request.request_id, [number], FinishReason.MAX_TOKENS if finished else None)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.requests), 0, 0, 10, 10, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0)

    def beat(self) -> EngineStats:
        return self.stats()

    def close(self) -> None:
        self.closed = True


class Peer:
    """The service's end, driven by hand from the test's own thread."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._num_sent = 0

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.send_raw(msgspec.msgpack.encode(message))

    def receive(self) -> FromEngine:
        message: FromEngine = self._decoder.decode(self._socket.recv()[NUMBER.size :])
        return message

    def send_raw(self, frame: bytes) -> None:
        self._socket.send(NUMBER.pack(self._num_sent) + frame)
        self._num_sent += 1


@pytest.fixture
def address() -> Iterator[str]:
    with BusDirectory() as directory:
        yield bus_address(directory.path, "engine")


@pytest.fixture
def peer(address: str) -> Iterator[Peer]:
    context = zmq.Context()
    with context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.setsockopt(zmq.SNDTIMEO, 20_000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        yield Peer(socket)
    context.term()


def request(request_id: int, max_tokens: int, prompt: Sequence[int] = (1,)) -> AddRequest:
    return AddRequest(request_id, list(prompt), SamplingParams(seed=0, max_tokens=max_tokens))


class Engine:
    """`run_engine` in a thread."""

    def __init__(self, load: Callable[[LoadReport], Core], address: str) -> None:
        self.status: int | None = None
        self._bus = EngineBus(address)
        self._thread = threading.Thread(target=self._run, args=(load,))
        self._thread.start()

    def _run(self, load: Callable[[LoadReport], Core]) -> None:
        self.status = run_engine(load, self._bus)

    def join(self) -> int | None:
        self._thread.join(MOST_SECONDS)
        self._bus.close()
        return self.status


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def ready(core: FakeCore, peer: Peer, address: str) -> Iterator[Engine]:
    """An engine that has said that it is ready, and is told to end after the test."""
    engine = Engine(lambda report: core, address)
    assert peer.receive() == EngineReady(LIMITS)
    yield engine
    peer.send(Shutdown())
    engine.join()


def outputs(message: FromEngine) -> list[RequestOutput]:
    assert isinstance(message, StepOutput)
    return message.outputs


def test_loading_reports_progress_then_readiness(core: FakeCore, peer: Peer, address: str) -> None:
    def load(report: LoadReport) -> FakeCore:
        for loaded in range(1001):
            report(loaded, 1000)
        return core

    engine = Engine(load, address)
    said = [peer.receive() for _ in range(102)]
    peer.send(Shutdown())
    assert engine.join() == 0
    assert said[0] == LoadProgress(0, 1000)
    assert said[-2:] == [LoadProgress(1000, 1000), EngineReady(LIMITS)]  # 101 reports: one per percent
    assert core.closed


def test_a_wait_is_reported_again_and_again_but_seldom() -> None:
    said: list[FromEngine] = []
    now = 0.0
    report = SentReport(said.append, lambda: now)
    for _ in range(3):
        report.waits("its turn")
    assert said == [LoadWaits("its turn")]
    now += WAITS_SECONDS
    report.waits("its turn")
    report.waits("rank 1")
    assert said[1:] == [LoadWaits("its turn"), LoadWaits("rank 1")]


def test_of_a_second_model_is_reported_how_much_is_read_too() -> None:
    said: list[FromEngine] = []
    report = SentReport(said.append)
    for total in (1000, 1000, 400):
        for read in (1, 2, total):
            report(read, total)
    assert said == [
        *(LoadProgress(read, 1000) for read in (1, 1000, 1, 1000)),
        *(LoadProgress(read, 400) for read in (1, 400)),
    ]


def test_a_model_that_cannot_be_loaded_is_reported_with_the_reason(peer: Peer, address: str) -> None:
    def load(report: LoadReport) -> FakeCore:
        raise ValueError("the checkpoint has no config.json")

    engine = Engine(load, address)
    assert peer.receive() == EngineFailed("ValueError: the checkpoint has no config.json")
    assert engine.join() == 1


@pytest.mark.parametrize(
    ("error", "traced"),
    [(ValueError("no such model"), False), (OSError("disk"), False), (KeyError("a fault of ours"), True)],
    ids=repr,
)
def test_the_stack_is_logged_for_faults_of_ours_alone(
    peer: Peer, address: str, caplog: pytest.LogCaptureFixture, error: Exception, traced: bool
) -> None:
    def load(report: LoadReport) -> FakeCore:
        raise error

    Engine(load, address).join()
    (record,) = [record for record in caplog.records if record.name == "loraplex_engine.process"]
    assert record.getMessage() == f"the model could not be loaded: {error}"
    assert bool(record.exc_info) == traced


def test_every_step_is_one_message(ready: Engine, peer: Peer) -> None:
    peer.send(request(1, max_tokens=3))
    steps = [outputs(peer.receive()) for _ in range(3)]
    assert [[output.token_ids for output in step] for step in steps] == [[[1]], [[2]], [[3]]]
    assert steps[2][0].finish_reason is FinishReason.MAX_TOKENS


def test_a_ping_is_answered_while_requests_run(ready: Engine, peer: Peer) -> None:
    peer.send(request(1, max_tokens=1_000_000), Ping(7))
    message = peer.receive()
    while isinstance(message, StepOutput):
        message = peer.receive()
    assert isinstance(message, Pong)
    assert message.nonce == 7
    peer.send(Abort([1]))


def test_a_ping_is_answered_while_nothing_runs(ready: Engine, peer: Peer, core: FakeCore) -> None:
    peer.send(Ping(8))
    assert peer.receive() == Pong(8, core.stats())


def test_a_request_that_the_core_refuses_fails_alone(ready: Engine, peer: Peer) -> None:
    peer.send(request(1, max_tokens=2, prompt=()))
    assert outputs(peer.receive()) == [RequestOutput(1, [], FinishReason.ERROR, error="the prompt is empty")]
    peer.send(request(2, max_tokens=1))
    assert outputs(peer.receive()) == [RequestOutput(2, [1], FinishReason.MAX_TOKENS)]


def test_a_request_that_does_not_decode_is_answered(ready: Engine, peer: Peer) -> None:
    peer.send_raw(msgspec.msgpack.encode(["AddRequest", 5, "no list"]))
    [output] = outputs(peer.receive())
    assert (output.request_id, output.finish_reason) == (5, FinishReason.ERROR)
    assert "not a valid request" in output.error


def test_bytes_that_are_no_message_change_nothing(ready: Engine, peer: Peer) -> None:
    peer.send_raw(b"\xc1 not a message")
    peer.send(Ping(1))
    assert isinstance(peer.receive(), Pong)


def test_an_abort_leaves_the_other_requests_alone(ready: Engine, peer: Peer, core: FakeCore) -> None:
    peer.send(request(1, max_tokens=1_000_000), request(2, max_tokens=1_000_000))
    peer.receive()
    peer.send(Abort([1, 99]), Ping(1))
    message = peer.receive()
    while isinstance(message, StepOutput):
        message = peer.receive()
    [output] = outputs(peer.receive())
    assert output.request_id == 2
    peer.send(Abort([2]))


def test_an_adapter_is_reported_without_any_request(ready: Engine, peer: Peer) -> None:
    peer.send(WantAdapter(KEY, 3, "/adapters/pirate"))
    assert peer.receive() == AdaptersChanged([AdapterStatus(KEY, 3, Residency.HOST)])


def test_an_adapter_that_the_core_refuses_is_reported(ready: Engine, peer: Peer) -> None:
    peer.send(WantAdapter(KEY, 3, ""))
    failed = AdapterStatus(KEY, 3, Residency.DISK, problems=["no path"], reason=INVALID)
    assert peer.receive() == AdaptersChanged([failed])


def test_an_adapter_is_dropped_on_demand(ready: Engine, peer: Peer, core: FakeCore) -> None:
    peer.send(WantAdapter(KEY, 1, least=Residency.DISK, most=Residency.DISK), Ping(1))
    peer.receive()
    assert core.unloaded == [KEY]


def test_an_upload_that_cannot_be_followed_is_left_alone(ready: Engine, peer: Peer, core: FakeCore) -> None:
    peer.send(UploadGrew(1, "/incoming/x", 100, 50), UploadEnded(1), Ping(1))
    assert isinstance(peer.receive(), Pong)
    assert core.uploads_ended == [1]


def test_a_step_that_raises_ends_the_process(core: FakeCore, peer: Peer, address: str) -> None:
    engine = Engine(lambda report: core, address)
    peer.receive()
    core.step_error = RuntimeError("the device is gone")
    peer.send(request(1, max_tokens=2))
    assert engine.join() == 1
    assert core.closed


# ---- the process itself ----------------------------------------------------------------------------------------------


def start_process(address: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex_engine", "--bus", address],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def test_a_configuration_that_makes_no_sense_is_reported_before_torch_is_imported(peer: Peer, address: str) -> None:
    config = msgspec.json.encode(EngineConfig(model="nowhere", block_size=3))
    with start_process(address) as process:
        assert process.stdin is not None
        process.stdin.write(config + b"\n")
        process.stdin.flush()
        message = peer.receive()
        process.communicate()
    assert isinstance(message, EngineFailed)
    assert "block_size 3 must be a power of two" in message.reason
    assert process.returncode == 1


def test_a_model_that_is_not_there_is_reported(peer: Peer, address: str, tmp_path: Path) -> None:
    config = msgspec.json.encode(EngineConfig(model=str(tmp_path / "nowhere"), threads=1))
    with start_process(address) as process:
        assert process.stdin is not None
        process.stdin.write(config + b"\n")
        process.stdin.flush()
        message = peer.receive()
        process.communicate()
    assert isinstance(message, EngineFailed)
    assert "nowhere" in message.reason


def test_the_process_ends_when_its_stdin_does(peer: Peer, address: str) -> None:
    with start_process(address) as process:
        assert process.stdin is not None
        process.stdin.write(b"{}\n")
        process.stdin.close()
        assert process.wait(MOST_SECONDS) != 0


def test_the_thread_limit_reaches_the_libraries() -> None:
    environment: dict[str, str] = {}
    limit_threads(3, environment)
    assert environment == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    limit_threads(None, environment)
    assert environment["OMP_NUM_THREADS"] == "3"
