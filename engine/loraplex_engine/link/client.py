"""One engine as the service sees it: requests go out, outputs come back as one stream per caller. Torch-free.

The client owns no socket. It sends through a function and is fed through `deliver`, so that it works the same over
ZeroMQ, in-process and with a fake engine. It lives as long as its engine process: a restarted engine gets a new client.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from loraplex_adapters.errors import COLD, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.messages import (
    Abort,
    AdapterFailed,
    AdapterLoaded,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    AddRequest,
    BringAdapter,
    EngineStats,
    LoadAdapter,
    PinAdapter,
    Ping,
    Pong,
    RequestOutput,
    StepOutput,
    ToEngine,
    UnloadAdapter,
)

T = TypeVar("T")

# Queues a message for the engine and returns at once. It never raises: whoever notices that the engine is gone calls
# `EngineClient.fail`.
Send = Callable[[ToEngine], None]

# What an engine says once it runs. EngineReady, EngineFailed and LoadProgress come before, and belong to whoever
# started it.
Running = StepOutput | AdapterLoaded | AdapterFailed | AdapterUnloaded | AdapterPinned | AdaptersMoved | Pong

# A caller that lets this many tokens wait has stopped reading: at 100 tokens a second it is 80 seconds behind.
MAX_PENDING_TOKENS = 8192
MAX_REFUSED = 64  # adapters, of which callers may think of as many weighted sums as they like


class SlowConsumerError(Exception):
    """The caller of `generate` fell too far behind. Its sequences are aborted."""

    def __init__(self, pending_tokens: int) -> None:
        super().__init__(f"{pending_tokens} tokens wait to be read")
        self.pending_tokens = pending_tokens


class EngineClient:
    """Sends requests to one engine and hands each caller its own outputs. For one event loop; not thread-safe."""

    def __init__(self, send: Send, *, max_pending_tokens: int = MAX_PENDING_TOKENS) -> None:
        self.stats: EngineStats | None = None  # as of the last step or pong
        self.error: Exception | None = None  # set once, by fail()
        self.adapters: dict[AdapterKey, AdapterLoaded] = {}  # what the engine has been given and not told to drop
        self.residency: dict[AdapterKey, Residency] = {}  # of those adapters; a missing one is on disk
        self.moves = Counter[tuple[Residency, Residency]]()  # from one place to another, adapters one by one
        self.num_loads = 0  # adapters read into host memory
        self.load_seconds = 0.0  # taken by all loads, from order to answer
        self.moved: Callable[[AdapterKey], None] = lambda key: None  # called when an adapter is in another place
        self._send = send
        self._max_pending_tokens = max_pending_tokens
        self._ids = itertools.count(1)
        self._generations: dict[int, Generation] = {}  # by request id, until the engine finished it
        self._loads: dict[AdapterKey, asyncio.Future[AdapterLoaded]] = {}
        self._load_began: dict[AdapterKey, float] = {}  # by the loop's clock
        self._arrivals: dict[AdapterKey, asyncio.Future[None]] = {}  # on the device
        self._leaving: set[AdapterKey] = set()  # on the device, and told to leave it
        self._sums: set[AdapterKey] = set()  # weighted sums on the device
        self._refused: dict[AdapterKey, AdapterRejected] = {}  # the latest that could not be loaded, or brought
        self._unloads: dict[AdapterKey, asyncio.Future[None]] = {}
        self._pins: dict[AdapterKey, asyncio.Future[AdapterPinned]] = {}
        self._pings: dict[int, asyncio.Future[Pong]] = {}

    # ---- requests ----------------------------------------------------------------------------------------------------

    def new_request_id(self) -> int:
        """A request id that is new to this engine."""
        return next(self._ids)

    @property
    def num_requests(self) -> int:
        """Sequences sent and not finished."""
        return len(self._generations)

    def generate(self, *requests: AddRequest) -> "Generation":
        """Start these sequences and return their outputs, interleaved as they come. Use the result in a `with`.

        Raises the error given to `fail` if the engine is gone.
        """
        self._check_alive()
        generation = Generation(self, [request.request_id for request in requests], self._max_pending_tokens)
        for request in requests:
            assert request.request_id not in self._generations, "request ids come from new_request_id, each used once"
            self._generations[request.request_id] = generation
        for request in requests:
            self._send(request)
        return generation

    def abort(self, request_ids: Iterable[int]) -> None:
        """Have the engine forget these requests. Those that finished already, or never were, are passed over.

        A `Generation` does this by itself when it is closed. This method does not end the iteration of its reader.
        """
        running = [request_id for request_id in request_ids if self._generations.pop(request_id, None)]
        if running and self.error is None:
            self._send(Abort(running))

    # ---- adapters and liveness ---------------------------------------------------------------------------------------

    def holds(self, key: AdapterKey | None) -> bool:
        """Whether a request for this adapter, or this weighted sum, can be sent now. None: the base model alone."""
        return self.error is None and (key is None or all(member in self.adapters for member in key.members))

    def on_device(self, key: AdapterKey) -> bool:
        """Whether a request for this adapter, or this weighted sum, starts at once."""
        if key.parts:
            return key in self._sums
        return self.residency.get(key) is Residency.DEVICE and key not in self._leaving

    def start_loading(self, key: AdapterKey, path: str) -> "asyncio.Future[AdapterLoaded]":
        """Have the engine read an adapter into host memory and bind it to the model, and do not wait.

        Callers that ask for the same adapter at the same time share the load, so do not cancel it. It ends with
        AdapterRejected or the error given to `fail`, which need not be looked at.
        """
        self._check_alive()
        if key not in self._loads:
            self._send_load(key, path, Residency.HOST)
        return self._loads[key]

    async def load_adapter(self, key: AdapterKey, path: str) -> AdapterLoaded:
        """`start_loading`, and wait. Being cancelled does not disturb the load. Raises what it ends with."""
        return await asyncio.shield(self.start_loading(key, path))

    async def bring_to_device(self, key: AdapterKey, path: str) -> None:
        """Load an adapter and have it on the device, and wait until it is there, however long others need the room.

        Raises what `start_loading` ends with, and AdapterRejected (COLD) if it is unloaded meanwhile.
        """
        self._check_alive()
        if self.on_device(key):
            return
        if key not in self._arrivals:
            self._arrivals[key] = _future()
            self._leaving.discard(key)
            self._send_load(key, path, Residency.DEVICE)
        await asyncio.shield(self._arrivals[key])

    def start_bringing(self, key: AdapterKey) -> None:
        """Have the engine bring to the device what it was told to load, or a weighted sum of it. Does not wait.

        Raises AdapterRejected instead, once, if that came to nothing the last time.
        """
        self._check_alive()
        if key in self._refused:
            raise self._refused.pop(key)
        self._leaving.discard(key)
        self._send(BringAdapter(key))

    async def leave_device(self, key: AdapterKey) -> None:
        """Have an adapter leave the device once no request uses it, and stay in host memory. Does not wait for that."""
        self._check_alive()
        self._call_back(key)
        self._send(UnloadAdapter(key, Residency.HOST))

    async def pin_adapter(self, key: AdapterKey, pinned: bool) -> None:
        """Pin a loaded adapter to the device, or unpin it, and wait for the engine's confirmation.

        Raises AdapterConflict if there are too many pins, and AdapterRejected if it cannot get there, or (COLD) is
        unloaded meanwhile.
        """
        self._check_alive()
        while key in self._pins:  # answers carry no number, so one load at a time
            await asyncio.wait({self._pins[key]})
            self._check_alive()
        answer = self._pins[key] = _future()
        self._send(PinAdapter(key, pinned))
        found = await asyncio.shield(answer)
        if found.reason:
            raise AdapterRejected([found.problem], found.reason)
        if found.problem:
            raise AdapterConflict(found.problem)

    async def unload_adapter(self, key: AdapterKey) -> None:
        """Have the engine drop an adapter, and wait until no request uses it any more, or until it is loaded again."""
        # An engine that is told to forget what it still reads would never answer the load.
        while key in self._loads and self.error is None:
            await asyncio.wait({self._loads[key]})
        self._check_alive()
        self.adapters.pop(key, None)
        if key not in self._unloads:
            self._unloads[key] = _future()
            self._call_back(key)
            self._send(UnloadAdapter(key))
        await asyncio.shield(self._unloads[key])

    async def ping(self) -> Pong:
        """Wait for a sign of life from between two steps. The caller sets the timeout."""
        self._check_alive()
        nonce = next(self._ids)
        self._pings[nonce] = _future()
        self._send(Ping(nonce))
        try:
            return await self._pings[nonce]
        finally:
            self._pings.pop(nonce, None)

    # ---- what comes from the engine ----------------------------------------------------------------------------------

    def deliver(self, message: Running) -> None:
        """Take one message from the engine. Answers that nobody waits for any more are dropped."""
        match message:
            case StepOutput(outputs=outputs, stats=stats):
                self.stats = stats
                for output in outputs:
                    self._deliver_output(output)
            case Pong(nonce=nonce, stats=stats):
                self.stats = stats
                _resolve(self._pings.get(nonce), message)
            case AdapterLoaded(key=key) if key in self._unloads:
                pass  # answers a load from before that unload: who asks twice may be answered twice
            case AdapterLoaded(key=key):
                self.adapters[key] = message
                self._refused.pop(key, None)
                self._move(key, max(Residency.HOST, self.residency.get(key, Residency.DISK)))
                self._count_load(key)
                _resolve(self._loads.pop(key, None), message)
            case AdapterFailed(key=key, problems=problems, reason=reason):
                self._load_began.pop(key, None)
                rejected = self._refused[key] = AdapterRejected(problems, reason)
                if len(self._refused) > MAX_REFUSED:
                    del self._refused[next(iter(self._refused))]
                _reject(self._loads.pop(key, None), rejected)
                _reject(self._arrivals.pop(key, None), rejected)
            case AdapterUnloaded(key=key):
                self._leave_memory(key)
                _resolve(self._unloads.pop(key, None), None)
            case AdapterPinned(key=key):
                _resolve(self._pins.pop(key, None), message)
            case AdaptersMoved(moves=moves):
                self._take_moves(moves)

    def fail(self, error: Exception) -> None:
        """Note that the engine is gone: every stream and call, waiting or later, ends with this error.

        Only the first error counts.
        """
        if self.error is not None:
            return
        self.error = error
        for generation in set(self._generations.values()):
            generation.end(error)
        self.adapters.clear()
        self._sums.clear()
        for key in list(self.residency):
            self._leave_memory(key)
        waiting: tuple[Mapping[Any, asyncio.Future[Any]], ...]
        waiting = (self._loads, self._arrivals, self._unloads, self._pins, self._pings)
        for futures in waiting:
            for future in futures.values():
                _reject(future, error)

    def _send_load(self, key: AdapterKey, path: str, residency: Residency) -> None:
        # This takes back an unload that has not happened yet: the engine will not answer that one.
        _resolve(self._unloads.pop(key, None), None)
        if key not in self._loads:
            self._loads[key] = _future()
            self._load_began[key] = asyncio.get_running_loop().time()
        self._send(LoadAdapter(key, path, residency))

    def _call_back(self, key: AdapterKey) -> None:
        """Fail waits for an adapter that is unloaded: its engine then forgets the order to bring it to the device."""
        if self.residency.get(key) is Residency.DEVICE:
            self._leaving.add(key)
        _reject(self._arrivals.pop(key, None), AdapterRejected(["it was unloaded meanwhile"], COLD))

    def _take_moves(self, moves: list[tuple[AdapterKey, Residency]]) -> None:
        for key, residency in moves:
            if key.parts:  # counts for no tier: it is made of adapters that do
                (self._sums.add if residency is Residency.DEVICE else self._sums.discard)(key)
                continue
            self._move(key, residency)
            if residency is Residency.DEVICE:
                _resolve(self._arrivals.pop(key, None), None)

    def _move(self, key: AdapterKey, residency: Residency) -> None:
        before = self.residency.get(key, Residency.DISK)
        if residency is not Residency.DEVICE:
            self._leaving.discard(key)
        self.residency[key] = residency
        if residency is not before:
            self.moves[before, residency] += 1
            self.moved(key)

    def _leave_memory(self, key: AdapterKey) -> None:
        """Note that an adapter is on disk alone: it was unloaded, or its engine is gone. This counts as no move."""
        self._leaving.discard(key)
        if self.residency.pop(key, Residency.DISK) is not Residency.DISK:
            self.moved(key)

    def _count_load(self, key: AdapterKey) -> None:
        began = self._load_began.pop(key, None)
        if began is not None:
            self.num_loads += 1
            self.load_seconds += asyncio.get_running_loop().time() - began

    def _deliver_output(self, output: RequestOutput) -> None:
        generation = self._generations.get(output.request_id)
        if generation is None:  # aborted while the output was on its way
            return
        if output.finish_reason is not None:
            del self._generations[output.request_id]
        generation._push(output)

    def _check_alive(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)


class Generation:
    """The outputs of sequences that run together, as they come, until each has finished.

    An asynchronous iterator; waiting for the next output may be cancelled or timed out without losing any. While the
    reader is busy, what comes for one sequence is merged into one output. Leaving the `with` aborts what still runs.
    """

    def __init__(self, client: EngineClient, request_ids: list[int], max_pending_tokens: int) -> None:
        self._client = client
        self._running = set(request_ids)
        self._max_pending_tokens = max_pending_tokens
        self._pending: dict[int, list[RequestOutput]] = {}  # in the order in which they are handed out
        self._num_pending_tokens = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises SlowConsumerError, or the error that ended the engine."""
        while not self._pending:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if not self._running:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        request_id = next(iter(self._pending))
        output = _merge(self._pending.pop(request_id))
        self._num_pending_tokens -= len(output.token_ids)
        return output

    def abort(self, request_id: int) -> None:
        """End one sequence, and drop its unread outputs. The others go on."""
        self._running.discard(request_id)
        for output in self._pending.pop(request_id, ()):
            self._num_pending_tokens -= len(output.token_ids)
        self._client.abort([request_id])

    def close(self) -> None:
        """End all sequences that still run. Closing twice is harmless."""
        running, self._running = self._running, set()
        self._pending.clear()
        self._client.abort(running)
        self._changed.set()

    def end(self, error: Exception) -> None:
        """End all sequences that still run, and have the reader get this error next."""
        self._error = error
        self.close()

    def _push(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self._running.discard(output.request_id)
        self._pending.setdefault(output.request_id, []).append(output)
        self._num_pending_tokens += len(output.token_ids)
        self._changed.set()
        if self._num_pending_tokens > self._max_pending_tokens:
            self.end(SlowConsumerError(self._num_pending_tokens))


def _merge(outputs: list[RequestOutput]) -> RequestOutput:
    """Merge the outputs of one sequence from several steps."""
    if len(outputs) == 1:
        return outputs[0]
    first, last = outputs[0], outputs[-1]
    logprobs = [position for output in outputs for position in output.logprobs or ()]
    return RequestOutput(
        request_id=first.request_id,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        logprobs=logprobs or None,
        prompt_logprobs=next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), None),
        num_cached_tokens=first.num_cached_tokens,
        queue_seconds=first.queue_seconds,
        adapter_load_seconds=first.adapter_load_seconds,
        error=last.error,
        error_reason=last.error_reason,
    )


def _future() -> asyncio.Future[T]:
    return asyncio.get_running_loop().create_future()


def _resolve(future: asyncio.Future[T] | None, result: T) -> None:
    if future is not None and not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future[Any] | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()  # marks the exception as retrieved: asyncio would log it if no caller waits
