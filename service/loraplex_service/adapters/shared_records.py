"""The records of adapters that the replicas of a fleet share."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from loraplex_adapters.records import AdapterChange, AdapterRecord, ChangeKind
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.shared_registry import SharedAdapterRegistry
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.records import CONFIGURED_KIND, STATE_KIND, AdapterRecords, Work
from loraplex_service.errors import Unavailable
from loraplex_service.state import State

T = TypeVar("T")


class SharedRecords(AdapterRecords):
    """Commits what callers change to the records of all replicas, and has the registry follow what others change."""

    def __init__(self, registry: SharedAdapterRegistry, state: State, work: BackgroundWork) -> None:
        self._shared: dict[str, AdapterRecord] = {}
        self._shares = registry
        self._work = work
        super().__init__(registry, state)
        state.follow(STATE_KIND, self._follow)
        state.follow(CONFIGURED_KIND, self._follow_configured)

    def serve(self, bring: Work, pin: Work) -> None:
        """Say what is done with versions that others have registered (`bring`), pinned or unpinned (`pin`)."""
        self._bring, self._pin = bring, pin

    async def configure(
        self, key_name: str, name: str, digest: str, change: Callable[[AdapterRegistry], T], make: Callable[[], T]
    ) -> T:
        """Do as for one server; what the configuration said is known to all replicas."""
        made = await self.change(key_name, change, lambda: None, make)
        if not self.was_configured(name, digest):
            await self._state.change(lambda: self._state.save(CONFIGURED_KIND, name, digest.encode()))
        return made

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _change(
        self, key_name: str, change: Callable[[AdapterRegistry], T], check: Callable[[], None], make: Callable[[], T]
    ) -> T:
        check()
        self._registry.foresee(key_name, change)  # what cannot be done here is refused here
        before = self._shares.shared(key_name, self._shared.get(key_name))
        record = self._shares.foresee_shared(key_name, before, change)
        if record != before:
            await self._commit(key_name, record)
        try:
            made = make()
        finally:
            self._adopt(key_name)
            self._note(key_name)
        with suppress(Unavailable):  # the change itself is in the database
            await self._state.saved()
        return made

    async def _commit(self, key_name: str, record: AdapterRecord | None) -> None:
        await self._state.save(STATE_KIND, key_name, None if record is None else msgspec.json.encode(record))
        self._know(key_name, record)
        self._shares.expect(key_name, record)

    def _know(self, key_name: str, record: AdapterRecord | None) -> None:
        if record is None:
            self._shared.pop(key_name, None)
        else:
            self._shared[key_name] = record

    def _follow(self, key_name: str, body: bytes | None) -> None:
        record = None if body is None else msgspec.json.decode(body, type=AdapterRecord)
        before = self._shared.get(key_name)
        self._know(key_name, record)
        try:
            self._adopt(key_name)
        except Exception:
            self._know(key_name, before)
            raise
        if self._tells_more(key_name):
            self._work.begin(self._tell(key_name))

    def _follow_configured(self, name: str, body: bytes | None) -> None:
        if body is None:
            self._state.delete(CONFIGURED_KIND, name)
        else:
            self._state.put(CONFIGURED_KIND, name, body)

    def _adopt(self, key_name: str) -> None:
        adopted = self._shares.adopt(key_name, self._shared.get(key_name))
        for version in adopted.new:
            self._work.begin(self._bring(version))
        for version in adopted.repinned:
            self._work.begin(self._pin(version))

    def _adapter_changed(self, change: AdapterChange) -> None:
        super()._adapter_changed(change)
        name = change.version.key.name
        if change.kind is ChangeKind.REMOVED:
            self._adopt(name)  # it may have been registered again meanwhile
        if change.kind in (ChangeKind.REMOVED, ChangeKind.CHANGED) and self._tells_more(name):
            self._work.begin(self._tell(name))

    def _tells_more(self, key_name: str) -> bool:
        """Whether others should know: a version is gone that was to be deleted, or the alias has moved."""
        shared = self._shared.get(key_name)
        if shared is None:
            return False
        known = self._shares.shared(key_name, shared)
        return known is None or len(known.versions) < len(shared.versions) or known.current != shared.current

    async def _tell(self, key_name: str) -> None:
        async def tell() -> None:
            if self._tells_more(key_name):
                await self._commit(key_name, self._shares.shared(key_name, self._shared.get(key_name)))

        await self._state.change(tell)
