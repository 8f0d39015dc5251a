"""Keeps one base model's engine process alive: starts it, listens for signs of life, starts it again when it dies."""

import asyncio
import logging
import os
import signal
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Protocol

import msgspec

from loraplex_engine.link.bus import FrameLost, ServiceBus, bus_address
from loraplex_engine.link.bus_directory import BusDirectory
from loraplex_engine.link.child import child_command
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import (
    EngineFailed,
    EngineLimits,
    EngineReady,
    EngineSized,
    LoadOn,
    LoadProgress,
    LoadWaits,
    Shutdown,
)
from loraplex_engine.link.requests import MAX_PENDING_TOKENS
from loraplex_service.environment import without_secrets
from loraplex_service.errors import LoraplexError, Unavailable
from loraplex_service.models.config import SupervisionConfig
from loraplex_service.models.load_signs import SLICES, LoadSigns
from loraplex_service.models.placement import NoRoomError, Seat
from loraplex_service.models.slow_reads import begin_read

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS: Final = 0.1  # for messages of an ended engine that are still on their way, such as EngineFailed
STANDS_STILL: Final = (
    "See whether a process or a file system stands still; if they are only slow, raise supervision.load_timeout_seconds"
)
RESTART_SECONDS: Final = 5.0  # after which callers may try again


class EngineState(Enum):
    """The state of an engine."""

    UNLOADED = auto()  # not loaded, and not meant to be
    LOADING = auto()
    ACTIVE = auto()
    UNLOADING = auto()  # takes no new requests, ends when the running ones have ended
    RESTARTING = auto()  # died after it had been ACTIVE, and is on its way back
    FAILED = auto()  # could not be loaded, or not be started again


class EngineProcess(Protocol):
    """The part of asyncio.subprocess.Process that the supervisor uses."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int: ...

    def kill(self) -> None: ...


Launch = Callable[[str], Awaitable[EngineProcess]]  # from a bus address to a process that will connect to it


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of loading, in bytes of weights."""

    bytes_loaded: int = 0
    bytes_total: int = 0


class _EngineLost(Exception):  # noqa: N818  (what happened, for the log and for `error`)
    """The process ended, was stuck, or reported that it cannot load."""


class EngineSupervisor:
    """One engine, over all its lives. `start` and `stop` may be called again and again; for one event loop.

    `changed` is called after every change of a public attribute. Each life of the process has a client of its own.
    When `changed` reports ACTIVE, no message has been sent through that client yet.

    `read_revision`: returns the present revision of the files that the process loads; "": they do not exist yet. It
    runs in threads.

    `seat`: says where the model is to be loaded, once its engine has said what it needs.
    """

    def __init__(
        self,
        name: str,
        launch: Launch,
        read_revision: Callable[[], str],
        seat: Seat,
        bus_directory: BusDirectory,
        config: SupervisionConfig,
        changed: Callable[[], None],
        unread_tokens: int = MAX_PENDING_TOKENS,
    ) -> None:
        self.name = name
        self.state = EngineState.UNLOADED
        self.client: EngineClient | None = None  # while ACTIVE or UNLOADING
        self.limits: EngineLimits | None = None  # since it was first loaded
        self.revision = ""  # of the weights of the present life, or of the last one
        self.progress = Progress()
        self.error = ""  # in FAILED and RESTARTING: why
        self.pid: int | None = None  # of the present life
        self.load_time: float | None = None  # seconds since the epoch
        self._launch = launch
        self._read_revision = read_revision
        self._revision_at_start = ""  # of the present life
        self._seat = seat
        self._directory = bus_directory
        self._config = config
        self._changed = changed
        self._unread_tokens = unread_tokens
        self._num_lives = 0
        self._run: asyncio.Task[None] | None = None
        self._stop_reason: LoraplexError | None = None
        self._news = asyncio.Event()

    # ---- from outside ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load, unless that has begun already. After a failure: try again."""
        if self._run is None or self._run.done():
            self._stop_reason = None
            self._set(EngineState.LOADING)
            self._run = asyncio.create_task(self._keep_alive(), name=f"engine {self.name}")
            self._run.add_done_callback(self._supervision_ended)

    async def wait_settled(self) -> None:
        """Wait until the engine is ACTIVE, FAILED or UNLOADED."""
        while self.state not in (EngineState.ACTIVE, EngineState.FAILED, EngineState.UNLOADED):
            self._news.clear()
            await self._news.wait()

    def begin_unloading(self) -> None:
        """Set the state to being unloaded, so that new requests are refused. Running ones go on until `stop`."""
        if self.state is EngineState.ACTIVE:
            self._set(EngineState.UNLOADING)

    async def stop(self, reason: LoraplexError) -> None:
        """End the process, by Shutdown if possible. Requests that still run on it end with `reason`."""
        self._stop_reason = reason
        if self._run is not None:
            self._run.cancel()
            await asyncio.wait({self._run})
        self._set(EngineState.UNLOADED)

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        """Start the process again and again, until it has failed too often or is no longer wanted."""
        clock = asyncio.get_running_loop().time
        delay = self._config.restart_delay_seconds
        failed_starts = 0
        while True:
            began = clock()
            was_ready = await self._live()
            logger.error("the engine of model %s is lost: %s", self.name, self.error)
            failed_starts = 0 if was_ready else failed_starts + 1
            if self.state is EngineState.UNLOADING:
                self._set(EngineState.UNLOADED)
                return
            if self.state is EngineState.LOADING or failed_starts >= self._config.failed_starts:
                self._set(EngineState.FAILED)
                return
            if was_ready and clock() - began >= self._config.stable_seconds:
                delay = self._config.restart_delay_seconds
            self._set(EngineState.RESTARTING)
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._config.restart_delay_max_seconds)

    def _supervision_ended(self, run: "asyncio.Task[None]") -> None:
        """Handle the end of supervision.

        After an unexpected error the model is FAILED, rather than LOADING for ever.
        """
        if not run.cancelled() and (error := run.exception()) is not None:
            logger.critical("the engine of model %s is no longer supervised", self.name, exc_info=error)
            self.error = f"its supervision failed: {error!r}"
            self._set(EngineState.FAILED)

    async def _live(self) -> bool:
        """Run one process from its start to its death; `error` then tells the cause.

        Returns whether it became ready.
        """
        self._num_lives += 1
        load = LoadSigns()
        with ExitStack() as stack:
            try:
                bus, process = await self._start_process(stack)
            except Exception as error:  # no descriptors, no memory, no directory, …
                self.error = f"its process could not be started: {error}"
            else:
                await self._accompany(process, bus, load)
        return load.ready.is_set()

    async def _start_process(self, stack: ExitStack) -> tuple[ServiceBus, EngineProcess]:
        """Start the process and bind the bus that it will connect to. The stack closes both."""
        self._revision_at_start = await self._revision_in_time()
        self._directory.ensure()
        address = bus_address(self._directory.path, f"{self.name}-{self._num_lives}")
        bus = stack.enter_context(ServiceBus(address))
        return bus, await self._launch(address)

    async def _revision_in_time(self) -> str:
        """The present revision. Raises OSError if it cannot be read, or not within the timeout of a load."""
        timeout = self._config.load_timeout_seconds
        reading = begin_read(self._read_revision)
        if not (await asyncio.wait({reading}, timeout=timeout))[0]:
            raise OSError(f"the files of the model were not read within {timeout:g} s. {STANDS_STILL}")
        return await reading

    async def _accompany(self, process: EngineProcess, bus: ServiceBus, load: LoadSigns) -> None:
        """Take messages and count silence until the process is gone."""
        self.pid = process.pid
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(process))
                tasks.create_task(self._listen(bus, load))
                tasks.create_task(self._beat(load))
        except* _EngineLost as lost:
            self.error = str(lost.exceptions[0])
        except* Exception as failures:  # whatever it is, the model must not stay without an engine in silence
            logger.error("the engine of model %s sent an invalid message", self.name, exc_info=failures)
            self.error = f"it sent an invalid message: {failures.exceptions[0]}"
        finally:
            await self._end(process, bus)

    async def _watch(self, process: EngineProcess) -> None:
        status = await process.wait()
        await asyncio.sleep(LAST_WORDS_SECONDS)
        raise _EngineLost(f"its process (pid {process.pid}) ended with {_describe_status(status)}")

    async def _listen(self, bus: ServiceBus, load: LoadSigns) -> None:
        while True:
            try:
                messages = await bus.receive()
            except FrameLost as error:
                raise _EngineLost(str(error)) from error
            if bus.num_bad_frames:  # its content is lost, and a caller may wait for it
                raise _EngineLost("it sent a frame that cannot be decoded")
            for message in messages:
                match message:
                    case LoadProgress(bytes_loaded=loaded, bytes_total=total):
                        self._note_progress(Progress(loaded, total), load)
                    case LoadWaits(what=what):
                        load.note(f"it waited for {what}")
                    case EngineSized():
                        load.is_asking = True
                        bus.send(await self._place(message))
                        load.is_asking = False
                        load.note("it had been told where to load")
                    case EngineFailed(reason=reason):
                        raise _EngineLost(reason)
                    case EngineReady(limits=limits):
                        await self._take_revision()
                        self.client = EngineClient(bus.send, max_pending_tokens=self._unread_tokens)
                        self.limits = limits
                        self.load_time = time.time()
                        self._set(EngineState.ACTIVE)
                        load.ready.set()
                    case _:
                        assert self.client is not None, f"{type(message).__name__} before EngineReady"
                        self.client.deliver(message)

    def _note_progress(self, progress: Progress, load: LoadSigns) -> None:
        if progress != self.progress:  # else it is no news, however often it is said
            load.note(f"it had read {progress.bytes_loaded} of {progress.bytes_total} bytes")
            self.progress = progress
            self._changed()

    async def _place(self, sized: EngineSized) -> LoadOn:
        try:
            return await self._seat.take(sized)
        except NoRoomError as error:
            raise _EngineLost(str(error)) from error

    async def _take_revision(self) -> None:
        """Note the revision that the process has loaded."""
        try:
            found = await begin_read(self._read_revision)
        except OSError as error:
            raise _EngineLost(f"the files that it has loaded cannot be found: {error}") from error
        if self._revision_at_start not in ("", found):
            raise _EngineLost("its files were changed while it loaded them")
        if self.revision not in ("", found):
            logger.warning("model %s was replaced: its revision is %s now, was %s", self.name, found, self.revision)
        self.revision = found

    async def _beat(self, load: LoadSigns) -> None:
        """Ping the engine, and give up on it when no answer comes.

        A loading engine has no step loop and is not pinged: it tells of itself.
        """
        await self._expect_loaded(load)
        assert self.client is not None
        while True:
            await self._expect_answer(self.client)
            await asyncio.sleep(self._config.heartbeat_seconds)

    async def _expect_loaded(self, load: LoadSigns) -> None:
        timeout = self._config.load_timeout_seconds
        ready = asyncio.create_task(load.ready.wait())
        try:
            while not (await asyncio.wait({ready}, timeout=timeout / SLICES))[0]:
                if load.is_silent():
                    raise _EngineLost(
                        f"nothing new was heard of it for {timeout:g} s while it loaded: {load.state}. {STANDS_STILL}"
                    )
        finally:
            ready.cancel()

    async def _expect_answer(self, client: EngineClient) -> None:
        timeout = self._config.heartbeat_timeout_seconds
        ping = asyncio.create_task(client.ping())
        try:
            for _ in range(SLICES):
                done, _ = await asyncio.wait({ping}, timeout=timeout / SLICES)
                if done:
                    return
            raise _EngineLost(f"no sign of life for {timeout:g} s")
        finally:
            ping.cancel()

    async def _end(self, process: EngineProcess, bus: ServiceBus) -> None:
        """Fail all requests that wait for this life, and make sure that its process is gone."""
        client, self.client = self.client, None
        if self.state is EngineState.ACTIVE and self._stop_reason is None:
            self._set(EngineState.RESTARTING)  # before any subscriber is told and reads it
        if client is not None:
            restarting = f"the engine of model {self.name!r} ended and is starting again; try again, or another replica"
            client.fail(self._stop_reason or Unavailable("ENGINE_RESTARTING", restarting, RESTART_SECONDS))
            if self._stop_reason is not None:
                bus.send(Shutdown())
                # Not asyncio.timeout: before Python 3.11.3 it takes the cancellation that led here for its own end.
                await asyncio.wait({asyncio.create_task(process.wait())}, timeout=self._config.stop_seconds)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        self.pid = None

    def _set(self, state: EngineState) -> None:
        if state is not self.state:
            logger.info("model %s: %s", self.name, state.name)
        self.state = state
        if state in (EngineState.LOADING, EngineState.RESTARTING):
            self.progress = Progress()
        if state not in (EngineState.FAILED, EngineState.RESTARTING):
            self.error = ""
        if state in (EngineState.FAILED, EngineState.UNLOADED):
            self._seat.leave()
        self._news.set()
        self._changed()


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"status {status}; its log says why"
    name = signal.Signals(-status).name
    return f"{name}, perhaps because the machine ran out of memory" if name == "SIGKILL" else name


def launcher(config: EngineConfig, name: str, log_level: str, log_format: str, meeting: Sequence[str] = ()) -> Launch:
    """A launcher of `python -m loraplex_engine` with this interpreter and this process's import path.

    `meeting`: the options by which the engine lets other machines come.
    """
    options = ("--name", name, "--log-level", log_level, "--log-format", log_format, *meeting)
    command, variables = child_command("loraplex_engine", *options, "--bus")

    async def launch(address: str) -> EngineProcess:
        environment = without_secrets(os.environ) | variables
        process = await asyncio.create_subprocess_exec(*command, address, stdin=PIPE, env=environment)
        assert process.stdin is not None
        with suppress(ConnectionError):  # it died at once, which the wait for it reports
            process.stdin.write(msgspec.json.encode(config) + b"\n")
            await process.stdin.drain()
        return process

    return launch
