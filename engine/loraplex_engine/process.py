"""The loop around the core: drain the inbox, take a step, send the results.

A request that cannot be taken is answered and fails alone. An exception that leaves `EngineCore.step` means that the
state of the engine or of the device is no longer known: the process ends, and the supervisor starts another one.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from loraplex_adapters.errors import INVALID
from loraplex_adapters.residency import Residency
from loraplex_engine.link.bus import BadRequest, EngineBus
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.messages import (
    Abort,
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
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
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_engine.scheduling.step import STALLED_SECONDS

logger = logging.getLogger(__name__)

WAITS_SECONDS: Final = 1.0  # between two signs that loading waits for the same


class Core(Protocol):
    """The part of `EngineCore` that the loop uses."""

    @property
    def limits(self) -> EngineLimits: ...

    def add(self, message: AddRequest) -> None: ...

    def set_vocabulary(self, message: SetVocabulary) -> None: ...

    def abort(self, request_ids: Sequence[int]) -> None: ...

    def want_adapter(self, wish: WantAdapter) -> None: ...

    def note_upload(self, news: UploadGrew | UploadEnded) -> None: ...

    def has_work(self) -> bool:
        """Whether `step` would do or report anything, now or once another thread has finished."""

    def step(self) -> list[FromEngine]: ...

    def stats(self) -> EngineStats: ...

    def beat(self) -> EngineStats:
        """The same, once all that computes the model has shown that it is alive."""

    def close(self) -> None: ...


def run_engine(load: Callable[[LoadReport], Core], bus: EngineBus) -> int:
    """Load, report the outcome, serve until told to stop. Returns the exit status of the process."""
    try:
        core = load(SentReport(bus.send))
    except Exception as error:
        # Of what the operator can do something about, the message says all; the stack is for faults of ours.
        known = isinstance(error, ValueError | OSError)
        logger.error("the model could not be loaded: %s", error, exc_info=not known)
        logger.debug("where the load ended", exc_info=known)
        bus.send(EngineFailed(f"{type(error).__name__}: {error}"))
        return 1
    # What is loaded stays: the collector need not look at it again in the middle of a step.
    gc.collect()
    gc.freeze()
    bus.send(EngineReady(core.limits))
    try:
        serve(core, bus)
    except Exception:
        logger.critical("the engine ends: a step failed in a way that leaves its state unknown", exc_info=True)
        return 1
    finally:
        core.close()
    return 0


def serve(core: Core, bus: EngineBus) -> None:
    """Take steps until Shutdown. Without work, sleep until a message comes."""
    timeout: float | None = None
    while True:
        for message in bus.receive(timeout):
            if isinstance(message, Shutdown):
                return
            answer = handle(core, message)
            if answer is not None:
                bus.send(answer)
        timeout = None
        if core.has_work():
            events = core.step()
            for event in events:
                bus.send(event)
            timeout = 0.0 if events else STALLED_SECONDS


def handle(core: Core, message: ToEngine | BadRequest) -> FromEngine | None:
    """Give one message to the core. Returns what can be answered at once."""
    match message:
        case AddRequest(request_id=request_id):
            try:
                core.add(message)
            except Exception as error:
                logger.exception("request %d could not be taken", request_id)
                return _request_failed(core, request_id, str(error))
        case BadRequest(request_id=request_id, problem=problem):
            return _request_failed(core, request_id, f"not a valid request: {problem}")
        case SetVocabulary():
            core.set_vocabulary(message)
        case Abort(request_ids=request_ids):
            core.abort(request_ids)
        case WantAdapter(key=key, order=order):
            try:
                core.want_adapter(message)
            except Exception as error:
                logger.exception("adapter %s could not be taken", key)
                failed = AdapterStatus(key, order, Residency.DISK, problems=[str(error)], reason=INVALID)
                return AdaptersChanged([failed])
        case UploadGrew() | UploadEnded():
            try:
                core.note_upload(message)
            except Exception:  # it is read when it is whole
                logger.exception("upload %d could not be followed", message.upload)
        case Ping(nonce=nonce):
            return Pong(nonce, core.beat())
    return None


def _request_failed(core: Core, request_id: int, error: str) -> StepOutput:
    return StepOutput([RequestOutput(request_id, [], FinishReason.ERROR, error=error)], core.stats())


class SentReport:
    """The `LoadReport` to the service: of each model, about a hundred times that there is progress; and what is waited
    for."""

    def __init__(self, send: Callable[[FromEngine], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._sent = (0, -1)  # bytes in all, of one model or of the small one after it, and percent of them
        self._awaited = ""
        self._last_wait = 0.0

    def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
        progress = bytes_total, 100 * bytes_loaded // max(bytes_total, 1)
        if progress != self._sent:
            self._sent = progress
            self._send(LoadProgress(bytes_loaded, bytes_total))

    def waits(self, what: str) -> None:
        now = self._clock()
        if what != self._awaited or now - self._last_wait >= WAITS_SECONDS:
            self._awaited, self._last_wait = what, now
            self._send(LoadWaits(what))
