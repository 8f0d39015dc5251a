"""The supervisor and real processes that can be killed, stopped and starved."""

import asyncio
import itertools
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from loraplex_engine.link.bus import EngineBus
from loraplex_engine.link.bus_directory import BusDirectory
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.messages import AddRequest, EngineSized, LoadOn
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.link.sizes import DeviceMemory, Needs
from loraplex_service.errors import FailedPrecondition, LoraplexError, Unavailable
from loraplex_service.models.config import SupervisionConfig
from loraplex_service.models.placement import NoRoomError
from loraplex_service.models.supervisor import EngineProcess, EngineState, EngineSupervisor, Launch
from tests.service.scripted_engine import LIMITS, Loading, ThreadedEngines, process_launcher
from tests.waits import MOST_SECONDS

QUICK = SupervisionConfig(
    heartbeat_seconds=0.05,
    heartbeat_timeout_seconds=20.0,
    restart_delay_seconds=0.01,
    restart_delay_max_seconds=0.02,
    failed_starts=2,
)
IMPATIENT = msgspec.structs.replace(QUICK, load_timeout_seconds=0.5)
UNLOADED = FailedPrecondition("MODEL_UNLOADED", "unloaded")


class FakeSeat:
    """Room for a model, or none."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem
        self.seconds = 0.0  # that an answer takes
        self.asked: list[EngineSized] = []
        self.num_left = 0

    async def take(self, sized: EngineSized) -> LoadOn:
        self.asked.append(sized)
        await asyncio.sleep(self.seconds)
        if self.problem:
            raise NoRoomError(self.problem)
        return LoadOn(["cuda:7"], 0.25)

    def leave(self) -> None:
        self.num_left += 1


class Watched(EngineSupervisor):
    """A supervisor whose history a test can wait for."""

    def __init__(self, launch: Launch, directory: BusDirectory, config: SupervisionConfig, problem: str = "") -> None:
        self.files = "r1"  # the revision of what the engine loads
        self.history: list[EngineState] = []
        self.seat = FakeSeat(problem)
        self._condition = asyncio.Event()
        super().__init__("tiny", launch, lambda: self.files, self.seat, directory, config, self._note)

    def _note(self) -> None:
        if self.history[-1:] != [self.state]:
            self.history.append(self.state)
        self._condition.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(MOST_SECONDS):
            while not condition():
                self._condition.clear()
                await self._condition.wait()


@asynccontextmanager
async def supervisor(*arguments: str, config: SupervisionConfig = QUICK, problem: str = "") -> AsyncIterator[Watched]:
    with BusDirectory() as directory:
        watched = Watched(process_launcher(*arguments), directory, config, problem)
        try:
            yield watched
        finally:
            await watched.stop(UNLOADED)


@asynccontextmanager
async def loading(load: Loading, engines: ThreadedEngines | None = None) -> AsyncIterator[Watched]:
    """An impatient supervisor of engines that do this while they load."""
    engines = engines or ThreadedEngines()
    engines.load = load
    with BusDirectory() as directory:
        watched = Watched(engines.launch, directory, IMPATIENT)
        try:
            yield watched
        finally:
            await watched.stop(UNLOADED)


@pytest.fixture
async def active() -> AsyncIterator[Watched]:
    async with supervisor() as watched:
        watched.start()
        await watched.wait_settled()
        yield watched


def client_of(watched: Watched) -> EngineClient:
    assert watched.client is not None
    return watched.client


def pid_of(watched: Watched) -> int:
    assert watched.pid is not None
    return watched.pid


def endless(client: EngineClient) -> AddRequest:
    return AddRequest(client.requests.new_id(), [1, 2], SamplingParams(seed=0, max_tokens=1 << 30))


async def test_an_engine_that_is_ready_is_active(active: Watched) -> None:
    assert active.history == [EngineState.LOADING, EngineState.ACTIVE]
    assert active.limits == LIMITS
    assert active.progress.bytes_loaded == 50


async def test_requests_pass_to_the_engine_and_outputs_back(active: Watched) -> None:
    client = client_of(active)
    request = AddRequest(client.requests.new_id(), [7, 8, 9], SamplingParams(seed=0, max_tokens=5))
    with client.requests.generate(request) as generation:
        token_ids = [token_id async for output in generation for token_id in output.token_ids]
    assert token_ids == [7, 8, 9, 7, 8]


async def test_a_model_that_cannot_be_loaded_is_failed_with_the_reason() -> None:
    async with supervisor("--fail", "no config.json") as watched:
        watched.start()
        await watched.wait_settled()
        assert watched.history == [EngineState.LOADING, EngineState.FAILED]
        assert watched.error == "ValueError: no config.json"


async def test_an_engine_is_told_where_to_load_its_model_once_it_has_said_what_that_needs() -> None:
    async with supervisor("--asks") as watched:
        watched.start()
        await watched.wait_settled()
        assert watched.seat.asked == [EngineSized(Needs(1, 2, 3, 4), [DeviceMemory("cpu", 8)])]
        assert watched.error == "ValueError: LoadOn(devices=['cuda:7'], fraction=0.25)"


async def test_a_model_for_which_there_is_no_room_is_failed_with_the_reason() -> None:
    async with supervisor("--asks", problem="it needs 9 bytes") as watched:
        watched.start()
        await watched.wait_settled()
        assert watched.history == [EngineState.LOADING, EngineState.FAILED]
        assert watched.error == "it needs 9 bytes"
        assert watched.seat.num_left == 1


async def test_an_engine_that_dies_while_loading_is_failed_with_its_status() -> None:
    async with supervisor("--die") as watched:
        watched.start()
        await watched.wait_settled()
        assert watched.state is EngineState.FAILED
        assert "ended with status 3" in watched.error


async def test_a_failed_engine_may_be_started_again(tmp_path: Path) -> None:
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    async with supervisor("--die-if-exists", str(obstacle)) as watched:
        watched.start()
        await watched.wait_settled()
        obstacle.unlink()
        watched.start()
        await watched.wait_settled()
        assert watched.history[1:] == [EngineState.FAILED, EngineState.LOADING, EngineState.ACTIVE]
        assert watched.error == ""


async def test_a_process_that_cannot_be_started_is_a_failure() -> None:
    async def launch(address: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec("/nowhere/python")

    with BusDirectory() as directory:
        watched = Watched(launch, directory, QUICK)
        watched.start()
        await watched.wait_settled()
        assert watched.state is EngineState.FAILED
        assert "could not be started" in watched.error


async def test_an_engine_comes_back_though_the_directory_of_its_bus_was_removed(active: Watched) -> None:
    shutil.rmtree(active._directory.path)
    os.kill(pid_of(active), signal.SIGKILL)
    await active.until(lambda: active.history[2:] == [EngineState.RESTARTING, EngineState.ACTIVE])
    await client_of(active).ping()


async def test_starts_that_fail_before_there_is_a_process_are_counted_and_logged(
    active: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    path = active._directory.path
    shutil.rmtree(path)
    path.write_text("in the way")
    os.kill(pid_of(active), signal.SIGKILL)
    await active.until(lambda: active.state is EngineState.FAILED)
    assert "could not be started" in active.error
    assert caplog.text.count("could not be started") == QUICK.failed_starts
    path.unlink()
    active.start()
    await active.wait_settled()
    assert active.history[2:] == [EngineState.RESTARTING, EngineState.FAILED, EngineState.LOADING, EngineState.ACTIVE]


async def test_files_that_were_replaced_are_another_revision_in_the_next_life(active: Watched) -> None:
    assert active.revision == "r1"
    active.files = "r2"
    assert active.revision == "r1"
    os.kill(pid_of(active), signal.SIGKILL)
    await active.until(lambda: active.history[2:] == [EngineState.RESTARTING, EngineState.ACTIVE])
    assert active.revision == "r2"


async def test_files_that_are_replaced_while_they_are_loaded_are_loaded_again(active: Watched) -> None:
    seen = iter(("r2", "r3"))
    active._read_revision = lambda: next(seen, "r3")
    os.kill(pid_of(active), signal.SIGKILL)
    await active.until(lambda: active.error == "its files were changed while it loaded them")
    await active.until(lambda: active.state is EngineState.ACTIVE)
    assert active.revision == "r3"


async def test_whatever_keeps_a_process_from_being_started_is_a_failed_start() -> None:
    async def launch(address: str) -> EngineProcess:
        raise RuntimeError("cannot start a thread")

    with BusDirectory() as directory:
        watched = Watched(launch, directory, QUICK)
        watched.start()
        await watched.wait_settled()
        assert (watched.state, "cannot start a thread" in watched.error) == (EngineState.FAILED, True)


async def test_a_supervision_that_breaks_is_a_failure_that_a_start_mends(
    active: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> bool:
        raise RuntimeError("what nobody thought of")

    with monkeypatch.context() as breaking:
        breaking.setattr(active, "_live", broken)
        os.kill(pid_of(active), signal.SIGKILL)
        await active.until(lambda: active.state is EngineState.FAILED)
    assert "what nobody thought of" in active.error
    active.start()
    await active.wait_settled()
    assert active.state is EngineState.ACTIVE


async def test_a_killed_engine_ends_its_streams_and_comes_back(active: Watched) -> None:
    client, pid = client_of(active), pid_of(active)
    with client.requests.generate(endless(client)) as generation:
        await anext(generation)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable) as raised:
            async for _ in generation:
                pass
    assert raised.value.reason == "ENGINE_RESTARTING"
    await active.until(lambda: active.history[2:] == [EngineState.RESTARTING, EngineState.ACTIVE])
    assert pid_of(active) != pid
    assert client_of(active) is not client
    await client_of(active).ping()


async def test_an_engine_that_gives_no_sign_of_life_is_replaced() -> None:
    async with supervisor(config=msgspec.structs.replace(QUICK, heartbeat_timeout_seconds=0.5)) as watched:
        watched.start()
        await watched.wait_settled()
        pid, client = pid_of(watched), client_of(watched)
        with client.requests.generate(endless(client)) as generation:
            await anext(generation)
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(Unavailable):
                async for _ in generation:
                    pass
        # At once, though the process may not be gone yet: whoever is told, and looks, must not find it ACTIVE.
        assert watched.state is EngineState.RESTARTING
        assert "no sign of life for 0.5 s" in watched.error
        await watched.until(lambda: watched.history[2:] == [EngineState.RESTARTING, EngineState.ACTIVE])
        assert pid_of(watched) != pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_an_engine_that_says_nothing_new_while_it_loads_is_failed() -> None:
    async with supervisor("--stand-still", config=IMPATIENT) as watched:
        watched.start()
        await watched.wait_settled()
        assert watched.pid is None
        assert watched.history == [EngineState.LOADING, EngineState.FAILED]
        assert "nothing new was heard of it for 0.5 s while it loaded" in watched.error
        assert "raise supervision.load_timeout_seconds" in watched.error


async def test_files_that_are_not_read_in_time_are_a_failed_start() -> None:
    answered = threading.Event()  # by the file system
    async with supervisor(config=IMPATIENT) as watched:
        watched._read_revision = lambda: "r1" if answered.wait() else ""
        watched.start()
        await watched.wait_settled()
        assert watched.history == [EngineState.LOADING, EngineState.FAILED]
        assert "the files of the model were not read within 0.5 s" in watched.error
        assert "raise supervision.load_timeout_seconds" in watched.error
        answered.set()
        watched._config = QUICK
        watched.start()
        await watched.wait_settled()
        assert watched.state is EngineState.ACTIVE


async def test_stopping_while_its_files_are_not_read_waits_for_nothing() -> None:
    answered = threading.Event()
    async with supervisor() as watched:
        watched._read_revision = lambda: "r1" if answered.wait() else ""
        watched.start()
        await asyncio.sleep(0)
        await watched.stop(UNLOADED)
        assert watched.state is EngineState.UNLOADED
    answered.set()


def told(report: LoadReport, bus: EngineBus) -> None:
    report.waits("its turn")


def read(report: LoadReport, bus: EngineBus) -> None:
    report(50, 100)


def placed(report: LoadReport, bus: EngineBus) -> None:
    bus.send(EngineSized(Needs(1, 2, 3, 4), [DeviceMemory("cpu", 8)]))
    bus.receive(None)


@pytest.mark.parametrize(
    ("step", "last"),
    [
        (told, "it waited for its turn"),
        (read, "it had read 50 of 100 bytes"),
        (placed, "it had been told where to load"),
        (lambda report, bus: None, "its process was starting"),
    ],
)
async def test_of_an_engine_that_stands_still_is_said_how_far_it_came(step: Loading, last: str) -> None:
    def load(report: LoadReport, bus: EngineBus) -> None:
        step(report, bus)
        bus.receive(None)  # nothing more, until it is killed

    async with loading(load) as watched:
        watched.start()
        await watched.wait_settled()
        assert f"while it loaded: {last}. " in watched.error


async def test_an_engine_that_stands_still_when_it_starts_again_is_replaced() -> None:
    engines, lives = ThreadedEngines(), itertools.count(1)

    def load(report: LoadReport, bus: EngineBus) -> None:
        if next(lives) == 2:
            bus.receive(None)

    async with loading(load, engines) as watched:
        watched.start()
        await watched.wait_settled()
        engines.started[0].kill()
        await watched.until(lambda: watched.history[2:] == [EngineState.RESTARTING, EngineState.ACTIVE])
        assert len(engines.started) == 3


async def test_while_an_engine_waits_for_its_place_no_news_of_it_is_expected() -> None:
    async with loading(placed) as watched:
        watched.seat.seconds = 3 * IMPATIENT.load_timeout_seconds
        watched.start()
        await watched.wait_settled()
        assert watched.state is EngineState.ACTIVE


async def test_an_engine_that_does_not_come_back_is_failed(tmp_path: Path) -> None:
    obstacle = tmp_path / "obstacle"
    async with supervisor("--die-if-exists", str(obstacle)) as watched:
        watched.start()
        await watched.wait_settled()
        obstacle.touch()
        os.kill(pid_of(watched), signal.SIGKILL)
        await watched.until(lambda: watched.state is EngineState.FAILED)
        assert watched.history[2:] == [EngineState.RESTARTING, EngineState.FAILED]


async def test_stopping_ends_the_process_and_its_streams_with_the_reason(active: Watched) -> None:
    client, pid = client_of(active), pid_of(active)
    with client.requests.generate(endless(client)) as generation:
        await anext(generation)
        await active.stop(UNLOADED)
        with pytest.raises(LoraplexError) as raised:
            async for _ in generation:
                pass
    assert raised.value is UNLOADED
    assert active.state is EngineState.UNLOADED
    assert active.client is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_engine_that_ignores_shutdown_is_killed() -> None:
    async with supervisor(config=msgspec.structs.replace(QUICK, stop_seconds=0.1)) as watched:
        watched.start()
        await watched.wait_settled()
        pid = pid_of(watched)
        os.kill(pid, signal.SIGSTOP)
        await watched.stop(UNLOADED)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_stopping_while_it_loads_leaves_no_process() -> None:
    async with supervisor() as watched:
        watched.start()
        await watched.until(lambda: watched.progress.bytes_loaded == 50)
        await watched.stop(UNLOADED)
        assert watched.state is EngineState.UNLOADED
        assert watched.pid is None


async def test_starting_twice_starts_one_process(active: Watched) -> None:
    pid = pid_of(active)
    active.start()
    assert active.state is EngineState.ACTIVE
    assert pid_of(active) == pid


async def test_an_engine_that_dies_while_being_unloaded_is_not_started_again(active: Watched) -> None:
    active.begin_unloading()
    os.kill(pid_of(active), signal.SIGKILL)
    await active.until(lambda: active.client is None)
    await active.until(lambda: active.history[2:] == [EngineState.UNLOADING, EngineState.UNLOADED])
