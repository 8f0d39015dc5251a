"""The adapters of one engine: what is wanted of each, how each one stands, and the callers who wait for a change."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from loraplex_adapters.errors import COLD, AdapterConflict, AdapterError, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.connection import Connection, new_answer, reject, resolve
from loraplex_engine.link.messages import AdapterFacts, AdapterStatus, WantAdapter
from loraplex_engine.link.uploads import FollowedUpload

T = TypeVar("T")

Outcome = Callable[["EngineAdapter"], T | None]  # None or False: there is none yet

MAX_REFUSED = 64  # adapters, of which callers may think of as many weighted sums as they like


class Read(NamedTuple):
    """The reading of an adapter into host memory that an engine was told to do, and has not answered."""

    order: int
    began: float  # by the loop's clock


@dataclass(slots=True)
class EngineAdapter:
    """One adapter, or weighted sum: what is wanted of it, and how it stands."""

    wish: WantAdapter  # the newest; once it is met or has failed, it lets the engine place the adapter as it likes
    status: AdapterStatus  # the newest, which may answer an older wish
    read: Read | None = None
    refused: AdapterRejected | None = None  # why the last wish came to nothing; None: it did not, or that was told

    @property
    def facts(self) -> AdapterFacts | None:
        """The facts of an adapter that the engine was given and not told to drop; None: of all others."""
        return None if self.wish.most is Residency.DISK else self.status.facts

    @property
    def is_on_device(self) -> bool:
        """Whether it is on the device, and was not told to leave it."""
        return self.status.tier is Residency.DEVICE and self.wish.most is Residency.DEVICE

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted or known of it."""
        unwanted = self.wish == _nothing_wanted(self.wish, pinned=False) and self.read is None
        return unwanted and self.status.facts is None and self.status.tier is not Residency.DEVICE and not self.refused

    def take(self, status: AdapterStatus) -> None:
        """Note how the adapter stands now, and whether that is all that was wanted."""
        rose = status.tier > self.status.tier
        self.status = status
        if status.problems and status.reason:
            self.refused = AdapterRejected(status.problems, status.reason)
        elif rose:
            self.refused = None
        failed = bool(status.problems) and self.wish.most is Residency.DEVICE  # what is to leave, leaves all the same
        if status.order >= self.wish.order and (failed or self._is_met()):
            self.wish = _nothing_wanted(self.wish, pinned=status.pinned)

    def has_been_read(self, order: int) -> AdapterFacts | None:
        """The facts, once a wish to have the adapter in host memory is met. Raises AdapterRejected if it failed."""
        status = self.status
        if status.order < order:
            return None
        if status.facts is not None and status.tier >= Residency.HOST:
            return status.facts
        self._check(order)
        return None

    def has_arrived(self, order: int) -> bool:
        """Whether a wish for the adapter on the device is met. Raises AdapterRejected if it failed or was undone."""
        if self.status.order >= order and self.status.tier is Residency.DEVICE:
            return True
        self._check(order)
        if self.wish.most is not Residency.DEVICE:
            raise AdapterRejected(["it was unloaded meanwhile"], COLD)
        return False

    def is_pinned(self, order: int) -> bool:
        """Whether a wish to pin the adapter is met. Raises AdapterConflict, or AdapterRejected if it was undone."""
        if self.status.order >= order and self.status.pinned:
            return True
        self._check(order)
        if not self.wish.pinned:
            undone = "unpinned" if self.wish.most is Residency.DEVICE else "unloaded"
            raise AdapterRejected([f"it was {undone} meanwhile"], COLD)
        return False

    def is_unpinned(self, order: int) -> bool:
        """Whether a wish to unpin the adapter is met, or was taken back."""
        return self.wish.pinned or (self.status.order >= order and not self.status.pinned)

    def _is_met(self) -> bool:
        wish, status = self.wish, self.status
        if wish.most is Residency.DISK:
            return status.facts is None
        return wish.least <= status.tier <= wish.most and wish.pinned == status.pinned

    def _check(self, order: int) -> None:
        """Raise the problems of this wish, or of a later one that took its place."""
        status = self.status
        if status.order >= order and status.problems:
            if not status.reason:
                raise AdapterConflict("; ".join(status.problems))
            raise AdapterRejected(status.problems, status.reason)


class Wait(NamedTuple, Generic[T]):
    """A caller who waits for an outcome for one adapter."""

    outcome: Outcome[T]
    answer: asyncio.Future[T]

    def ends(self, adapter: EngineAdapter) -> bool:
        """Whether the wait is over, which its caller then hears."""
        try:
            found = self.outcome(adapter)
        except AdapterError as error:
            reject(self.answer, error)
        else:
            if found:
                resolve(self.answer, found)
        return self.answer.done()


class EngineAdapters:
    """Tells one engine what is wanted of adapters, and knows how each one stands."""

    def __init__(self, connection: Connection) -> None:
        self.moves = Counter[tuple[Residency, Residency]]()  # from one place to another, adapters one by one
        self.moved: Callable[[AdapterKey], None] = lambda key: None  # called when an adapter is in another place
        self.was_read: Callable[[float], None] = lambda seconds: None  # called for each read, from order to answer
        self._connection = connection
        self._adapters: dict[AdapterKey, EngineAdapter] = {}
        self._waits: dict[AdapterKey, list[Wait[Any]]] = {}
        self._orders = itertools.count(1)
        self._uploads = itertools.count(1)

    # ---- how adapters stand ------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> dict[AdapterKey, AdapterStatus]:
        """How each adapter stands that the engine was given and not told to drop."""
        return {key: adapter.status for key, adapter in self._adapters.items() if adapter.facts is not None}

    @property
    def residency(self) -> dict[AdapterKey, Residency]:
        """The tiers of adapters; a missing one is on disk. Weighted sums count for no tier: their members do."""
        return {key: adapter.status.tier for key, adapter in self._adapters.items() if not key.parts}

    def facts(self, key: AdapterKey) -> AdapterFacts | None:
        """The facts of an adapter that the engine was given and not told to drop; None: of all others."""
        return self._adapters[key].facts if key in self._adapters else None

    def tier(self, key: AdapterKey) -> Residency:
        """The tier nearest to the device that holds an adapter or a weighted sum."""
        return self._adapters[key].status.tier if key in self._adapters else Residency.DISK

    def holds(self, key: AdapterKey | None) -> bool:
        """Whether a request for this adapter, or this weighted sum, can be sent now. None: the base model alone."""
        members = () if key is None else key.members
        return self._connection.error is None and all(self.facts(member) is not None for member in members)

    def on_device(self, key: AdapterKey) -> bool:
        """Whether a request for this adapter, or this weighted sum, starts at once."""
        return key in self._adapters and self._adapters[key].is_on_device

    def until(self, key: AdapterKey, outcome: "Outcome[T]") -> "asyncio.Future[T]":
        """The outcome for an adapter, once there is one. Ends with the AdapterError that `outcome` raises, or the error
        with which the engine ended, which need not be looked at.
        """
        self._connection.check()
        wait = Wait[T](outcome, new_answer())
        self._waits.setdefault(key, []).append(wait)
        self._tell(key)
        return wait.answer

    # ---- what callers ask for ----------------------------------------------------------------------------------------

    def follow_upload(self, path: str, size_bytes: int) -> FollowedUpload:
        """Have the engine read the weights that are being written to a directory, while they come."""
        return FollowedUpload(self._connection, next(self._uploads), path, size_bytes)

    def start_loading(
        self,
        key: AdapterKey,
        path: str,
        is_hashed: bool = False,
        ahead: bool = False,
        upload: FollowedUpload | None = None,
    ) -> "asyncio.Future[AdapterFacts]":
        """Have the engine read an adapter into host memory and bind it to the model, and do not wait.

        is_hashed: the files are known to have the key's digest. ahead: nobody waits for it, so that it takes less of
        the cores, and its turn behind others. upload: has brought the files, and is whole.

        Callers that ask for the same adapter at the same time share the load. It ends with AdapterRejected or the error
        with which the engine ended, which need not be looked at.
        """
        adapter = self._adapter(key)
        if not ahead:
            self._hurry(key)
        number = upload.number if upload is not None and upload.connection is self._connection else 0
        least = max(Residency.HOST, adapter.wish.least)
        read = adapter.read or self._read(key, path, least, is_hashed=is_hashed, ahead=ahead, upload=number)
        return self.until(key, lambda adapter: adapter.has_been_read(read.order))

    async def load(self, key: AdapterKey, path: str) -> AdapterFacts:
        """`start_loading`, and wait. Being cancelled does not disturb the load. Raises what it ends with."""
        return await self.start_loading(key, path)

    async def bring_to_device(self, key: AdapterKey, path: str) -> None:
        """Load an adapter and have it on the device, and wait until it is there, however long others need the room.

        Raises what `start_loading` ends with, and AdapterRejected (COLD) if it is unloaded meanwhile.
        """
        adapter = self._adapter(key)
        if adapter.is_on_device and adapter.status.order >= adapter.wish.order:
            return
        if adapter.read is None or adapter.wish.least is not Residency.DEVICE:
            self._read(key, path, Residency.DEVICE)
        self._hurry(key)
        order = adapter.wish.order
        await self.until(key, lambda adapter: adapter.has_arrived(order))

    def start_bringing(self, key: AdapterKey) -> None:
        """Have the engine bring to the device what it was told to load, or a weighted sum of it. Does not wait.

        Raises AdapterRejected instead, once, if that came to nothing the last time.
        """
        adapter = self._adapter(key)
        if adapter.refused is not None:
            refused, adapter.refused = adapter.refused, None
            raise refused
        if adapter.wish.least is not Residency.DEVICE:
            self._want(key, least=Residency.DEVICE, most=Residency.DEVICE)

    async def leave_device(self, key: AdapterKey) -> None:
        """Have an adapter leave the device once no request uses it, and stay in host memory. Does not wait for that."""
        most = min(Residency.HOST, self._adapter(key).wish.most)  # an unload that waits goes on
        self._want(key, least=Residency.DISK, most=most, pinned=False)

    async def pin(self, key: AdapterKey, pinned: bool) -> None:
        """Pin a loaded adapter to the device, or unpin it, and wait for the engine's confirmation.

        Raises AdapterConflict if there are too many pins, and AdapterRejected if it cannot get there, or (COLD) is
        unloaded or unpinned meanwhile.
        """
        most = Residency.DEVICE if pinned else self._adapter(key).wish.most
        order = self._want(key, pinned=pinned, most=most)
        await self.until(key, lambda adapter: adapter.is_pinned(order) if pinned else adapter.is_unpinned(order))

    async def unload(self, key: AdapterKey) -> None:
        """Have the engine drop an adapter, and wait until no request uses it any more, or until it is loaded again.

        A load that is under way ends first, so that its callers get what they waited for.
        """
        while self._adapter(key).read is not None:
            await self.until(key, lambda adapter: adapter.read is None)
        if self._adapter(key).wish.most is not Residency.DISK:
            self._want(key, least=Residency.DISK, most=Residency.DISK, pinned=False)
        await self.until(key, lambda adapter: adapter.wish.most is not Residency.DISK)

    # ---- what comes from the engine ----------------------------------------------------------------------------------

    def deliver(self, statuses: Iterable[AdapterStatus]) -> None:
        """Take what the engine says of adapters."""
        for status in statuses:
            adapter = self._adapter(status.key)
            before = adapter.status.tier
            adapter.take(status)
            self._end_read(adapter)
            self._note_move(adapter, before)
            self._tell(status.key)
            if status.problems:
                self._adapters[status.key] = self._adapters.pop(status.key)  # behind those that were refused before
                self._forget_refusals()
            self._drop_if_idle(status.key)

    def fail(self, error: Exception) -> None:
        """Note that the engine is gone: every call that waits ends with this error."""
        lost, self._adapters = self._adapters, {}
        for key, adapter in lost.items():
            if adapter.status.tier is not Residency.DISK and not key.parts:
                self.moved(key)
        for waits in self._waits.values():
            for wait in waits:
                reject(wait.answer, error)
        self._waits.clear()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _adapter(self, key: AdapterKey) -> EngineAdapter:
        if key not in self._adapters:
            wish = WantAdapter(key, 0, least=Residency.DISK)
            self._adapters[key] = EngineAdapter(wish, AdapterStatus(key, 0, Residency.DISK))
        return self._adapters[key]

    def _want(self, key: AdapterKey, **changes: Any) -> int:
        """Change what is wanted of an adapter, and tell the engine all of it. Returns the wish's order."""
        self._connection.check()
        adapter = self._adapter(key)
        order = next(self._orders)
        adapter.wish = msgspec.structs.replace(
            adapter.wish, **({"path": "", "is_hashed": False, "upload": 0} | changes | {"order": order})
        )
        if adapter.wish.most is not Residency.DEVICE:
            adapter.refused = None
        self._connection.send(adapter.wish)
        self._tell(key)
        return order

    def _hurry(self, key: AdapterKey) -> None:
        """Have the engine know that somebody waits for what it reads ahead."""
        if self._adapters[key].wish.ahead:
            self._want(key, ahead=False)

    def _read(self, key: AdapterKey, path: str, least: Residency, **more: Any) -> Read:
        order = self._want(key, path=path, least=least, most=Residency.DEVICE, **more)
        adapter = self._adapters[key]
        adapter.read = adapter.read or Read(order, asyncio.get_running_loop().time())
        return adapter.read

    def _tell(self, key: AdapterKey) -> None:
        """End the waits for an adapter that are over now."""
        adapter = self._adapter(key)
        waits = [wait for wait in self._waits.pop(key, []) if not wait.ends(adapter)]
        if waits:
            self._waits[key] = waits

    def _end_read(self, adapter: EngineAdapter) -> None:
        read, status = adapter.read, adapter.status
        if read is None or status.order < read.order:
            return
        if status.facts is not None and status.tier is not Residency.DISK:
            adapter.read = None
            self.was_read(asyncio.get_running_loop().time() - read.began)
        elif status.problems:
            adapter.read = None

    def _note_move(self, adapter: EngineAdapter, before: Residency) -> None:
        status = adapter.status
        if status.tier is before or status.key.parts:
            return
        if status.facts is not None:  # else it was unloaded, which counts as no move
            self.moves[before, status.tier] += 1
        self.moved(status.key)

    def _forget_refusals(self) -> None:
        refused = [key for key, adapter in self._adapters.items() if adapter.refused is not None]
        for key in refused[:-MAX_REFUSED]:
            self._adapters[key].refused = None
            self._drop_if_idle(key)

    def _drop_if_idle(self, key: AdapterKey) -> None:
        if key in self._adapters and self._adapters[key].is_idle and key not in self._waits:
            del self._adapters[key]


def _nothing_wanted(wish: WantAdapter, pinned: bool) -> WantAdapter:
    """What is wanted after a wish has come to its end: no tier, and perhaps a pin that holds."""
    return msgspec.structs.replace(
        wish, path="", least=Residency.DISK, most=Residency.DEVICE, pinned=pinned, ahead=False
    )
