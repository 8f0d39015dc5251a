"""Adapters as something that requests need before they can run: a slot on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loraplex_adapters.errors import COLD, AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.resources import NeverReadyError, Preparer


class AdapterSlots(Protocol):
    """The part of the adapter pool that requests use."""

    @property
    def changes(self) -> int:
        """Grows whenever an adapter that could not be acquired might be acquired now, or might be refused."""

    def acquire(self, key: AdapterKey) -> int | None:
        """The adapter's slot, held until `release`; None: not there yet, ask again. Raises AdapterRejected."""

    def release(self, key: AdapterKey) -> None: ...

    def invocation_tokens(self, key: AdapterKey) -> Sequence[int]:
        """The tokens in a prompt that invoke a held adapter; empty: it applies to all tokens."""

    def has_head(self, key: AdapterKey) -> bool:
        """Whether a held adapter has a classification head."""

    def leaves_cache(self, key: AdapterKey) -> bool:
        """Whether all keys and values are the base model's with a held adapter, too."""

    def make_room(self, key: AdapterKey) -> None:
        """Make room for an adapter that waits for room on the device."""


class AdapterPreparer(Preparer):
    """Gives requests the slots of their adapters. The pool and the store's threads bring them there."""

    def __init__(self, slots: AdapterSlots, base_classifies: bool = False) -> None:
        """`base_classifies`: whether the base model has a classification head, for adapters that bring none."""
        self._slots = slots
        self._base_classifies = base_classifies

    @property
    def changes(self) -> int:
        return self._slots.changes

    def key(self, request: Request) -> AdapterKey | None:
        return request.adapter

    def give(self, request: Request) -> bool:
        key = _adapter(request)
        try:
            request.adapter_slot = self._slots.acquire(key)
        except AdapterRejected as rejected:
            raise NeverReadyError(str(rejected), rejected.reason) from rejected
        if request.adapter_slot is None:
            return False
        if problem := self._misuse(request, self._slots.has_head(key)):
            self._slots.release(key)
            raise NeverReadyError(problem)
        request.invoke_adapter(self._slots.invocation_tokens(key))
        request.leaves_cache = self._slots.leaves_cache(key)
        return True

    def take_back(self, request: Request) -> None:
        self._slots.release(_adapter(request))

    def hurry(self, request: Request) -> None:
        self._slots.make_room(_adapter(request))

    def _misuse(self, request: Request, has_head: bool) -> str:
        """Why an adapter with a classification head, or without one, is of no use to a request; "": it is."""
        classifies = request.pooling is not None and request.pooling.classify
        if classifies and not has_head and not self._base_classifies:
            return f"adapter {request.adapter} has no classification head"
        if has_head and request.draws:
            return f"adapter {request.adapter} has a classification head, and generates no text"
        return ""

    def limit(self, request: Request) -> tuple[float, NeverReadyError] | None:
        seconds = request.adapter_wait_seconds
        if seconds is None:
            return None
        return seconds, NeverReadyError(f"it is not on the device after a wait of {seconds:g} s; try again", COLD)


def _adapter(request: Request) -> AdapterKey:
    assert request.adapter is not None
    return request.adapter
