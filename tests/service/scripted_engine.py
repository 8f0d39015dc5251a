"""An engine whose model is a script: the true bus and the true loop, around a core that computes nothing.

It runs as a thread of the test, or as a process of its own (`python scripted_engine.py --bus ADDRESS …`) that can be
killed, stopped and starved like a real one. Every request gets its prompt back, again and again, a token a step.
"""

import argparse
import asyncio
import os
import sys
import threading
import time
from array import array
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from loraplex_adapters.errors import INVALID
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.bus import BadRequest, EngineBus
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.messages import (
    AdapterFacts,
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    Device,
    EngineLimits,
    EngineSized,
    EngineStats,
    FromEngine,
    LoadProgress,
    RequestOutput,
    SetVocabulary,
    StepOutput,
    ToEngine,
    UploadEnded,
    UploadGrew,
    WantAdapter,
)
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_engine.link.sizes import DeviceMemory, Needs
from loraplex_engine.process import run_engine
from loraplex_service.models.supervisor import EngineProcess, Launch

LIMITS = EngineLimits(
    architecture="ScriptedForCausalLM",
    dtype="float32",
    quantization="",
    vocab_size=258,
    max_model_len=1 << 20,
    max_adapter_rank=8,
    max_num_seqs=4,
    total_blocks=1 << 16,
    block_size=16,
    weight_bytes=1000,
    kv_cache_bytes=2000,
    kernel_backend="none",
    device=Device("cpu", "none", 1 << 30),
    hidden_size=4096,
)
STEP_SECONDS = 0.001  # so that an endless request does not take the processor from everybody else
REJECTED = "rejected"  # an adapter in a directory of this name does not fit the model


class ScriptedCore:
    """What `run_engine` needs of a core."""

    def __init__(self) -> None:
        self.limits = LIMITS
        self.requests: dict[int, AddRequest] = {}
        self.given: Counter[int] = Counter()
        self.adapters: set[AdapterKey] = set()
        self.loaded: list[AdapterKey] = []  # every order to read an adapter, one by one
        self.loads_allowed = threading.Event()
        self.loads_allowed.set()
        self.pools = True  # else requests without a next token wait for ever
        self.pinned: set[AdapterKey] = set()
        self.max_pins = 2
        self.residency: dict[AdapterKey, Residency] = {}
        self._orders: dict[AdapterKey, int] = {}
        self._wishes: dict[AdapterKey, WantAdapter] = {}
        self.wishes: list[WantAdapter] = []  # all of them, for tests
        self._moved: set[AdapterKey] = set()
        self.uploads: list[UploadGrew | UploadEnded] = []  # all news of them, for tests

    def add(self, message: AddRequest) -> None:
        self.requests[message.request_id] = message
        if message.adapter is not None:
            self.residency[message.adapter] = Residency.DEVICE
            self._moved.add(message.adapter)
        self.given[message.request_id] = len(message.output_token_ids)

    def set_vocabulary(self, message: SetVocabulary) -> None:
        pass

    def abort(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def want_adapter(self, wish: WantAdapter) -> None:
        self.wishes.append(wish)
        if wish.path:
            self.loaded.append(wish.key)
        unread = self._wishes.pop(wish.key, wish)
        self._wishes[wish.key] = msgspec.structs.replace(wish, path=wish.path or unread.path)
        self._orders[wish.key] = wish.order

    def note_upload(self, news: UploadGrew | UploadEnded) -> None:
        self.uploads.append(news)

    def has_work(self) -> bool:
        return bool(self.requests or self._wishes or self._moved)

    def step(self) -> list[FromEngine]:
        ready = [request for request in self.requests.values() if request.pooling is None or self.pools]
        outputs = [self._next(request) for request in ready]
        events = self._adapter_events()
        if outputs:
            time.sleep(STEP_SECONDS)
            events.append(StepOutput(outputs, self.stats()))
        return events

    def stats(self) -> EngineStats:
        used = len(self.requests)
        users = Counter(request.adapter for request in self.requests.values() if request.adapter is not None)
        free = LIMITS.total_blocks - used
        return EngineStats(used, 0, 0, LIMITS.total_blocks, free, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, list(users.items()))

    def beat(self) -> EngineStats:
        return self.stats()

    def close(self) -> None:
        pass

    def _in_use(self) -> set[AdapterKey]:
        return {request.adapter for request in self.requests.values() if request.adapter is not None}

    def _next(self, request: AddRequest) -> RequestOutput:
        if request.pooling is not None:
            del self.requests[request.request_id]
            values = array("f", request.prompt_token_ids[: LIMITS.hidden_size]).tobytes()
            return RequestOutput(request.request_id, [], FinishReason.MAX_TOKENS, queue_seconds=0.0, pooled=values)
        number = self.given[request.request_id]
        self.given[request.request_id] += 1
        token_id = request.prompt_token_ids[number % len(request.prompt_token_ids)]
        finished = number + 1 >= request.sampling.max_tokens
        if finished:
            del self.requests[request.request_id]
        reason = FinishReason.MAX_TOKENS if finished else None
        return RequestOutput(request.request_id, [token_id], reason, queue_seconds=None if number else 0.0)

    def _adapter_events(self) -> list[FromEngine]:
        ready = [wish for wish in self._wishes.values() if self._may_place(wish)]
        for wish in ready:
            del self._wishes[wish.key]
        statuses = [self._place(wish) for wish in ready]
        statuses += [self._status(key) for key in self._moved]
        self._moved.clear()
        return [AdaptersChanged(statuses)] if statuses else []

    def _may_place(self, wish: WantAdapter) -> bool:
        if wish.most is Residency.DISK:
            return wish.key not in self._in_use()
        return not wish.path or self.loads_allowed.is_set()

    def _place(self, wish: WantAdapter) -> AdapterStatus:
        key = wish.key
        if Path(wish.path).name == REJECTED:
            return self._status(key, ["q_proj: shape [8, 3], this model needs [rank, 64]"], INVALID)
        if wish.path:
            self.adapters.add(key)
        if wish.most is Residency.DISK:
            self.adapters.discard(key)
        least = Residency.DEVICE if wish.pinned else wish.least
        self.residency[key] = min(max(self.residency.get(key, Residency.DISK), least), wish.most)
        if not wish.pinned:
            self.pinned.discard(key)
        elif len(self.pinned - {key}) == self.max_pins:
            return self._status(key, ["unpin others"])
        else:
            self.pinned.add(key)
        return self._status(key)

    def _status(self, key: AdapterKey, problems: Sequence[str] = (), reason: str = "") -> AdapterStatus:
        facts = AdapterFacts(4, 1024, ["q_proj"], ["a warning"]) if key in self.adapters else None
        tier = self.residency.get(key, Residency.DISK)
        return AdapterStatus(key, self._orders.get(key, 0), tier, key in self.pinned, facts, list(problems), reason)


# ---- as a thread -----------------------------------------------------------------------------------------------------


class _KillableBus(EngineBus):
    """Looks up from its wait, so that a thread can be ended as a process is killed."""

    def __init__(self, address: str, killed: threading.Event) -> None:
        super().__init__(address)
        self._killed = killed

    def receive(self, timeout_seconds: float | None) -> list[ToEngine | BadRequest]:
        while not self._killed.is_set():
            messages = super().receive(0.005 if timeout_seconds is None else timeout_seconds)
            if messages or timeout_seconds is not None:
                return messages
        raise SystemExit("killed")


class ThreadedEngine:
    """What the supervisor sees as a process."""

    pid = -1

    def __init__(self, core: ScriptedCore, load: "Loading", address: str) -> None:
        self.core = core
        self._load = load
        self._killed = threading.Event()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, args=(address,), daemon=True).start()

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        self._killed.set()

    def _loaded(self, report: LoadReport, bus: EngineBus) -> ScriptedCore:
        self._load(report, bus)
        return self.core

    def _run(self, address: str) -> None:
        status = -9
        try:
            with _KillableBus(address, self._killed) as bus:
                status = run_engine(lambda report: self._loaded(report, bus), bus)
        except SystemExit:
            pass
        self._loop.call_soon_threadsafe(self._ended.set_result, status)


Loading = Callable[[LoadReport, EngineBus], object]  # what an engine does while it loads


class ThreadedEngines:
    """Starts engines for a supervisor, and keeps them for the test to look at."""

    def __init__(self) -> None:
        self.started: list[ThreadedEngine] = []
        self.prepare: Callable[[ScriptedCore], None] = lambda core: None
        self.load: Loading = lambda report, bus: None

    async def launch(self, address: str) -> EngineProcess:
        core = ScriptedCore()
        self.prepare(core)
        self.started.append(ThreadedEngine(core, self.load, address))
        return self.started[-1]

    @property
    def core(self) -> ScriptedCore:
        """Of the engine that was started last."""
        return self.started[-1].core


# ---- as a process ----------------------------------------------------------------------------------------------------


def process_launcher(*arguments: str) -> Launch:
    """Starts this file as a process. `arguments`: see `main`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    async def launch(address: str) -> EngineProcess:
        return await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--bus", address, *arguments, stdin=PIPE, env=environment
        )

    return launch


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bus", required=True)
    parser.add_argument("--fail", help="say with this reason that the model cannot be loaded")
    parser.add_argument("--asks", action="store_true", help="ask where to load the model, and fail with the answer")
    parser.add_argument("--die", action="store_true", help="end without a word while loading")
    parser.add_argument("--die-if-exists", type=Path, help="the same, if there is such a file")
    parser.add_argument("--stand-still", action="store_true", help="load no further, and say the same for ever")
    arguments = parser.parse_args()

    def load(report: LoadReport) -> ScriptedCore:
        report(50, 100)
        while arguments.stand_still:
            bus.send(LoadProgress(50, 100))
            bus.receive(STEP_SECONDS)
        if arguments.fail:
            raise ValueError(arguments.fail)
        if arguments.die or (arguments.die_if_exists and arguments.die_if_exists.exists()):
            os._exit(3)
        return ScriptedCore()

    with EngineBus(arguments.bus) as bus:
        if arguments.asks:
            bus.send(EngineSized(Needs(1, 2, 3, 4), [DeviceMemory("cpu", 8)]))
            arguments.fail = str(bus.receive(None)[0])
        return run_engine(load, bus)


if __name__ == "__main__":
    sys.exit(main())
