"""The device tier: which adapters have a slot on the device, which may take one, and which must leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from loraplex_adapters.errors import TOO_LARGE, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.layer import Site
from loraplex_adapters.runtime.mirror import NO_MIRROR, Mirror
from loraplex_adapters.runtime.store import AdapterStore
from loraplex_adapters.runtime.weights import LoadedAdapter

MAX_PINNED_FRACTION = 0.5  # share of slots and bytes; the rest stays free for other adapters


@dataclass(slots=True)
class _Resident:
    slot: int
    nbytes: int
    sites: tuple[str, ...]  # of its tables: there are thousands of a model with experts
    num_requests: int = 0
    pinned: bool = False
    draining: bool = False  # takes no new requests, so that another gets its room
    unloading: bool = False  # dropped as soon as no request uses it
    invocation_tokens: tuple[int, ...] = ()  # of activated LoRA
    has_head: bool = False  # for classification
    leaves_cache: bool = False  # whether all keys and values are the base model's


class AdapterPool:
    """Gives adapters a slot on the device, within a number of slots and a budget of bytes.

    Every adapter takes exactly the bytes of its own ranks. The least recently used leaves first, but never one that a
    request uses, nor one that is pinned. Called between steps, from the thread that steps.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        store: AdapterStore,
        num_slots: int,
        budget_bytes: int,
        mirror: Mirror = NO_MIRROR,
    ) -> None:
        self._sites = sites
        self._mirror = mirror
        self._store = store
        self._num_slots = num_slots
        self._budget_bytes = budget_bytes
        self._free_slots = list(range(num_slots - 1, -1, -1))  # the lowest is taken first
        self._residents: OrderedDict[AdapterKey, _Resident] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._changes = 0
        self.moved: set[AdapterKey] = set()  # adapters that came or left, until the caller clears it

    @property
    def changes(self) -> int:
        """Grows whenever an adapter that could not be acquired might be acquired now, or might be refused."""
        return self._changes + self._store.changes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def holds(self, key: AdapterKey) -> bool:
        """Whether an adapter is on the device and takes requests. Does not count as use."""
        return key in self._residents and not self._residents[key].draining

    def is_pinned(self, key: AdapterKey) -> bool:
        """Whether an adapter stays on the device, used or not."""
        return key in self._residents and self._residents[key].pinned

    def in_use(self) -> list[tuple[AdapterKey, int]]:
        """The adapters that requests use, with the number of requests."""
        return [(key, resident.num_requests) for key, resident in self._residents.items() if resident.num_requests]

    def residents(self) -> list[tuple[AdapterKey, int]]:
        """The adapters on the device, with the number of requests that use each; least recently used first."""
        return [(key, resident.num_requests) for key, resident in self._residents.items()]

    # ---- for requests ----------------------------------------------------------------------------------------------

    def acquire(self, key: AdapterKey) -> int | None:
        """The adapter's slot, held until `release`; None: not there yet, ask again when `changes` has grown.

        Raises AdapterRejected if the adapter cannot be loaded, or could never fit.
        """
        resident = self._residents.get(key)
        if resident is None:
            resident = self._bring_in(key, ahead=False)
        if resident is None or resident.draining:
            return None
        resident.num_requests += 1
        self._residents.move_to_end(key)
        return resident.slot

    def release(self, key: AdapterKey) -> None:
        """Note that one request less uses the adapter."""
        resident = self._residents[key]
        assert resident.num_requests > 0, f"adapter {key} is released more often than acquired"
        resident.num_requests -= 1
        if resident.num_requests == 0 and (resident.draining or resident.unloading):
            self._drop(key)
        self._changes += 1

    def invocation_tokens(self, key: AdapterKey) -> tuple[int, ...]:
        """The tokens in a prompt that invoke a held adapter; empty: it applies to all tokens."""
        return self._residents[key].invocation_tokens

    def has_head(self, key: AdapterKey) -> bool:
        """Whether a held adapter has a classification head."""
        return self._residents[key].has_head

    def leaves_cache(self, key: AdapterKey) -> bool:
        """Whether all keys and values are the base model's with a held adapter, too."""
        return self._residents[key].leaves_cache

    def make_room(self, key: AdapterKey) -> None:
        """Make room for an adapter that has waited too long: let the resident with the fewest requests drain and leave.

        The resident takes no new requests until it is gone. Only one drains at a time. Nothing happens if room is not
        what the adapter waits for.
        """
        loaded = self._store.get(key)
        if loaded is None or self._victims_for(loaded.nbytes) is not None:
            return
        candidates = [key for key, resident in self._residents.items() if not resident.pinned]
        if candidates and not any(resident.draining for resident in self._residents.values()):
            self._drain(min(candidates, key=lambda key: self._residents[key].num_requests))

    # ---- for the operator ------------------------------------------------------------------------------------------

    def bring_in(self, key: AdapterKey) -> bool:
        """Bring an adapter to the device ahead of its requests, in place of one that no request uses.

        Returns False if it is not there yet: ask again when `changes` has grown. Raises AdapterRejected as `acquire`
        does.
        """
        resident = self._residents.get(key) or self._bring_in(key, ahead=True)
        if resident is None or resident.draining:
            return False
        resident.unloading = False
        return True

    def unload(self, key: AdapterKey) -> None:
        """Free the room of an adapter, and of compositions that contain it, as soon as no request uses them.

        An adapter that is not here is not an error.
        """
        for other in [other for other in self._residents if key in other.members]:
            resident = self._residents[other]
            resident.pinned = False
            resident.unloading = True
            if resident.num_requests == 0:
                self._drop(other)
                self._changes += 1

    def keep(self, key: AdapterKey) -> None:
        """Take back an `unload` that waits for requests to end."""
        if key in self._residents:
            self._residents[key].unloading = False

    def pin(self, key: AdapterKey) -> None:
        """Keep an adapter on the device until `unpin`, used or not.

        Raises AdapterConflict if it is not there, or if pins would take more than half of the slots or bytes.
        """
        resident = self._residents.get(key)
        if resident is None:
            raise AdapterConflict(f"adapter {key} is not on the device: load it before pinning it")
        if resident.pinned:
            return
        others = [other for other in self._residents.values() if other.pinned]
        num_bytes = sum(other.nbytes for other in others) + resident.nbytes
        if (
            len(others) + 1 > self._num_slots * MAX_PINNED_FRACTION
            or num_bytes > self._budget_bytes * MAX_PINNED_FRACTION
        ):
            raise AdapterConflict(
                f"adapter {key} cannot be pinned: pins may take half of the slots and bytes; unpin others"
            )
        resident.pinned = True
        self.recall(key)

    def unpin(self, key: AdapterKey) -> None:
        """Let an adapter be evicted again. An adapter that is not pinned is not an error."""
        resident = self._residents.get(key)
        if resident is not None:
            resident.pinned = False
            self._changes += 1

    def recall(self, key: AdapterKey) -> None:
        """Let an adapter that was to leave take requests again. An adapter that is not here is not an error."""
        resident = self._residents.get(key)
        if resident is not None and resident.draining:
            resident.draining = False
            self.moved.add(key)
            self._changes += 1

    # ---- room ------------------------------------------------------------------------------------------------------

    def _bring_in(self, key: AdapterKey, ahead: bool) -> _Resident | None:
        loaded = self._store.get(key)
        if loaded is not None:
            self._check_fits(loaded)
        victims = self._victims_for(loaded.nbytes if loaded is not None else 0)
        if loaded is None:
            # Ahead of its turn an adapter is read only into free room.
            self._store.request(key, may_evict=victims is not None, ahead=ahead)
            return None
        if victims is None:
            return None
        for victim in victims:
            self._drop(victim)
        return self._put(key, loaded)

    def _check_fits(self, loaded: LoadedAdapter) -> None:
        pinned_bytes = sum(resident.nbytes for resident in self._residents.values() if resident.pinned)
        if loaded.nbytes > self._budget_bytes - pinned_bytes:
            limits = f"all adapters together may use {self._budget_bytes}, of which {pinned_bytes} are pinned"
            raise AdapterRejected([f"it needs {loaded.nbytes} bytes on the device; {limits}"], TOO_LARGE)

    def _victims_for(self, nbytes: int) -> list[AdapterKey] | None:
        """The adapters that must leave to free a slot and `nbytes`; None: those that may leave are not enough."""
        free_bytes, free_slots = self._budget_bytes - self._used_bytes, len(self._free_slots)
        victims: list[AdapterKey] = []
        for key, resident in self._residents.items():
            if free_bytes >= nbytes and free_slots:
                break
            if not resident.num_requests and not resident.pinned:
                victims.append(key)
                free_bytes += resident.nbytes
                free_slots += 1
        return victims if free_bytes >= nbytes and free_slots else None

    def _put(self, key: AdapterKey, loaded: LoadedAdapter) -> _Resident:
        slot = self._free_slots.pop()
        self._mirror.put(slot, loaded.number)
        try:
            for site, packed in loaded.packed.items():
                self._sites[site].table.put(slot, packed)
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._clear(slot, loaded.packed)
            problem = f"the device has no {loaded.nbytes} bytes left for it: {error}"
            raise AdapterRejected([problem], TOO_LARGE) from error
        resident = self._residents[key] = _Resident(
            slot,
            loaded.nbytes,
            tuple(loaded.packed),
            invocation_tokens=loaded.invocation_tokens,
            has_head=loaded.num_labels > 0,
            leaves_cache=loaded.leaves_cache,
        )
        self._used_bytes += loaded.nbytes
        self.moved.add(key)
        return resident

    def _drop(self, key: AdapterKey) -> None:
        resident = self._residents.pop(key)
        self._used_bytes -= resident.nbytes
        self.moved.add(key)
        self._clear(resident.slot, resident.sites)

    def _drain(self, key: AdapterKey) -> None:
        self._residents[key].draining = True
        self.moved.add(key)

    def _clear(self, slot: int, sites: Iterable[str]) -> None:
        self._mirror.remove(slot)
        for site in sites:
            self._sites[site].table.remove(slot)
        self._free_slots.append(slot)
