"""The adapters of one engine: what it was told to load, where each one is, and the callers who wait for that."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from loraplex_adapters.errors import COLD, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.connection import Connection, new_answer, reject, resolve
from loraplex_engine.link.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    BringAdapter,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)

# What an engine says about its adapters.
AdapterNews = AdapterLoaded | AdapterFailed | AdapterUnloaded | AdapterPinned | AdaptersMoved

MAX_REFUSED = 64  # adapters, of which callers may think of as many weighted sums as they like


class EngineAdapters:
    """Has one engine load, move, pin and unload adapters, and knows where each one is."""

    def __init__(self, connection: Connection) -> None:
        self.loaded: dict[AdapterKey, AdapterLoaded] = {}  # what the engine has been given and not told to drop
        self.residency: dict[AdapterKey, Residency] = {}  # of those adapters; a missing one is on disk
        self.moves = Counter[tuple[Residency, Residency]]()  # from one place to another, adapters one by one
        self.num_loads = 0  # adapters read into host memory
        self.load_seconds = 0.0  # taken by all loads, from order to answer
        self.moved: Callable[[AdapterKey], None] = lambda key: None  # called when an adapter is in another place
        self._connection = connection
        self._loads: dict[AdapterKey, asyncio.Future[AdapterLoaded]] = {}
        self._load_began: dict[AdapterKey, float] = {}  # by the loop's clock
        self._arrivals: dict[AdapterKey, asyncio.Future[None]] = {}  # on the device
        self._leaving: set[AdapterKey] = set()  # on the device, and told to leave it
        self._sums: set[AdapterKey] = set()  # weighted sums on the device
        self._refused: dict[AdapterKey, AdapterRejected] = {}  # the latest that could not be loaded, or brought
        self._unloads: dict[AdapterKey, asyncio.Future[None]] = {}
        self._pins: dict[AdapterKey, asyncio.Future[AdapterPinned]] = {}

    # ---- what callers ask for ----------------------------------------------------------------------------------------

    def holds(self, key: AdapterKey | None) -> bool:
        """Whether a request for this adapter, or this weighted sum, can be sent now. None: the base model alone."""
        return self._connection.error is None and (key is None or all(member in self.loaded for member in key.members))

    def on_device(self, key: AdapterKey) -> bool:
        """Whether a request for this adapter, or this weighted sum, starts at once."""
        if key.parts:
            return key in self._sums
        return self.residency.get(key) is Residency.DEVICE and key not in self._leaving

    def start_loading(self, key: AdapterKey, path: str) -> "asyncio.Future[AdapterLoaded]":
        """Have the engine read an adapter into host memory and bind it to the model, and do not wait.

        Callers that ask for the same adapter at the same time share the load, so do not cancel it. It ends with
        AdapterRejected or the error with which the engine ended, which need not be looked at.
        """
        self._connection.check()
        if key not in self._loads:
            self._send_load(key, path, Residency.HOST)
        return self._loads[key]

    async def load(self, key: AdapterKey, path: str) -> AdapterLoaded:
        """`start_loading`, and wait. Being cancelled does not disturb the load. Raises what it ends with."""
        return await asyncio.shield(self.start_loading(key, path))

    async def bring_to_device(self, key: AdapterKey, path: str) -> None:
        """Load an adapter and have it on the device, and wait until it is there, however long others need the room.

        Raises what `start_loading` ends with, and AdapterRejected (COLD) if it is unloaded meanwhile.
        """
        self._connection.check()
        if self.on_device(key):
            return
        if key not in self._arrivals:
            self._arrivals[key] = new_answer()
            self._leaving.discard(key)
            self._send_load(key, path, Residency.DEVICE)
        await asyncio.shield(self._arrivals[key])

    def start_bringing(self, key: AdapterKey) -> None:
        """Have the engine bring to the device what it was told to load, or a weighted sum of it. Does not wait.

        Raises AdapterRejected instead, once, if that came to nothing the last time.
        """
        self._connection.check()
        if key in self._refused:
            raise self._refused.pop(key)
        self._leaving.discard(key)
        self._connection.send(BringAdapter(key))

    async def leave_device(self, key: AdapterKey) -> None:
        """Have an adapter leave the device once no request uses it, and stay in host memory. Does not wait for that."""
        self._connection.check()
        self._call_back(key)
        self._connection.send(UnloadAdapter(key, Residency.HOST))

    async def pin(self, key: AdapterKey, pinned: bool) -> None:
        """Pin a loaded adapter to the device, or unpin it, and wait for the engine's confirmation.

        Raises AdapterConflict if there are too many pins, and AdapterRejected if it cannot get there, or (COLD) is
        unloaded meanwhile.
        """
        self._connection.check()
        while key in self._pins:  # answers carry no number, so one load at a time
            await asyncio.wait({self._pins[key]})
            self._connection.check()
        answer = self._pins[key] = new_answer()
        self._connection.send(PinAdapter(key, pinned))
        found = await asyncio.shield(answer)
        if found.reason:
            raise AdapterRejected([found.problem], found.reason)
        if found.problem:
            raise AdapterConflict(found.problem)

    async def unload(self, key: AdapterKey) -> None:
        """Have the engine drop an adapter, and wait until no request uses it any more, or until it is loaded again."""
        # An engine that is told to forget what it still reads would never answer the load.
        while key in self._loads and self._connection.error is None:
            await asyncio.wait({self._loads[key]})
        self._connection.check()
        self.loaded.pop(key, None)
        if key not in self._unloads:
            self._unloads[key] = new_answer()
            self._call_back(key)
            self._connection.send(UnloadAdapter(key))
        await asyncio.shield(self._unloads[key])

    # ---- what comes from the engine ----------------------------------------------------------------------------------

    def deliver(self, message: AdapterNews) -> None:
        """Take one message from the engine. Answers that nobody waits for any more are dropped."""
        match message:
            case AdapterLoaded(key=key) if key in self._unloads:
                pass  # answers a load from before that unload: who asks twice may be answered twice
            case AdapterLoaded(key=key):
                self.loaded[key] = message
                self._refused.pop(key, None)
                self._move(key, max(Residency.HOST, self.residency.get(key, Residency.DISK)))
                self._count_load(key)
                resolve(self._loads.pop(key, None), message)
            case AdapterFailed(key=key, problems=problems, reason=reason):
                self._load_began.pop(key, None)
                rejected = self._refused[key] = AdapterRejected(problems, reason)
                if len(self._refused) > MAX_REFUSED:
                    del self._refused[next(iter(self._refused))]
                reject(self._loads.pop(key, None), rejected)
                reject(self._arrivals.pop(key, None), rejected)
            case AdapterUnloaded(key=key):
                self._leave_memory(key)
                resolve(self._unloads.pop(key, None), None)
            case AdapterPinned(key=key):
                resolve(self._pins.pop(key, None), message)
            case AdaptersMoved(moves=moves):
                self._take_moves(moves)

    def fail(self, error: Exception) -> None:
        """Note that the engine is gone: every call that waits ends with this error."""
        self.loaded.clear()
        self._sums.clear()
        for key in list(self.residency):
            self._leave_memory(key)
        waiting: tuple[Mapping[AdapterKey, asyncio.Future[Any]], ...]
        waiting = (self._loads, self._arrivals, self._unloads, self._pins)
        for answers in waiting:
            for answer in answers.values():
                reject(answer, error)

    def _send_load(self, key: AdapterKey, path: str, residency: Residency) -> None:
        # This takes back an unload that has not happened yet: the engine will not answer that one.
        resolve(self._unloads.pop(key, None), None)
        if key not in self._loads:
            self._loads[key] = new_answer()
            self._load_began[key] = asyncio.get_running_loop().time()
        self._connection.send(LoadAdapter(key, path, residency))

    def _call_back(self, key: AdapterKey) -> None:
        """Fail waits for an adapter that is unloaded: its engine then forgets the order to bring it to the device."""
        if self.residency.get(key) is Residency.DEVICE:
            self._leaving.add(key)
        reject(self._arrivals.pop(key, None), AdapterRejected(["it was unloaded meanwhile"], COLD))

    def _take_moves(self, moves: list[tuple[AdapterKey, Residency]]) -> None:
        for key, residency in moves:
            if key.parts:  # counts for no tier: it is made of adapters that do
                (self._sums.add if residency is Residency.DEVICE else self._sums.discard)(key)
                continue
            self._move(key, residency)
            if residency is Residency.DEVICE:
                resolve(self._arrivals.pop(key, None), None)

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
