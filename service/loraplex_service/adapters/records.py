"""The record of every adapter in the state file, from which a restart brings the registry back."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.records import AdapterChange, AdapterRecord, ChangeKind
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import AdapterSpec, AdapterVersion
from loraplex_service.errors import Unavailable, unknown_adapter
from loraplex_service.state import State

T = TypeVar("T")
Work = Callable[[AdapterVersion], Coroutine[Any, Any, None]]

STATE_KIND = "adapter"
CONFIGURED_KIND = "configured"  # by name of an adapter of the configuration: the digest that it had


class AdapterRecords:
    """Keeps the state file in step with the registry. What callers change is on the disk before it happens."""

    def __init__(self, registry: AdapterRegistry, state: State) -> None:
        """Restore the registry from the saved state."""
        self._registry = registry
        self._state = state
        damaged = [name for name, body in state.read(STATE_KIND).items() if not self._restore(name, body)]
        self._read_all = not damaged
        registry.subscribe(self._adapter_changed)

    async def change(
        self,
        key_name: str,
        change: Callable[[AdapterRegistry], T],
        check: Callable[[], None],
        make: Callable[[], T] | None = None,
    ) -> T:
        """Save a change of the registry, then make it. Changes run one after the other, even if their caller goes away.

        `check` runs when no other change is under way, and raises objections. `make`: the change with all that it
        takes; None: the registry's change alone. Raises Unavailable (STATE_UNWRITABLE), what these two raise, and
        NotFound if the version is gone by the time that the change is saved; the change is then not made.
        """
        try:
            return await self._state.change(
                lambda: self._change(key_name, change, check, make or (lambda: change(self._registry)))
            )
        except AdapterNotFound as error:
            tenant, _, adapter_id = key_name.partition("/")
            raise unknown_adapter(f"tenants/{tenant}/adapters/{adapter_id}", error) from error

    @property
    def are_whole(self) -> bool:
        """Whether the registry knows of all versions that there are."""
        return self._read_all and self._state.is_current

    def serve(self, bring: Work, pin: Work) -> None:
        """Say what to do with versions that others have registered, pinned or unpinned. Nobody else is here."""

    async def saved(self) -> None:
        """Wait until everything that has changed is on the disk. Raises Unavailable (STATE_UNWRITABLE)."""
        await self._state.saved()

    def was_configured(self, name: str, digest: str) -> bool:
        """Whether an adapter of the configuration had this digest at the last start, too."""
        return self._state.read(CONFIGURED_KIND).get(name) == digest.encode()

    async def configure(
        self, key_name: str, name: str, digest: str, change: Callable[[AdapterRegistry], T], make: Callable[[], T]
    ) -> T:
        """Register an adapter of the configuration, and note the digest that it has at this start.

        `change`, `make`: see `change`.
        """
        made = make()
        self._state.put(CONFIGURED_KIND, name, digest.encode())
        return made

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _change(
        self, key_name: str, change: Callable[[AdapterRegistry], T], check: Callable[[], None], make: Callable[[], T]
    ) -> T:
        check()
        record = self._registry.foresee(key_name, change)
        await self._state.save(STATE_KIND, key_name, None if record is None else msgspec.json.encode(record))
        try:
            made = make()
        finally:
            self._note(key_name)  # also what has happened by itself meanwhile
        with suppress(Unavailable):  # the change itself is on the disk
            await self._state.saved()
        return made

    def _note(self, key_name: str) -> None:
        record = self._registry.record(key_name)
        if record is None:
            self._state.delete(STATE_KIND, key_name)
        else:
            self._state.put(STATE_KIND, key_name, msgspec.json.encode(record))

    def _adapter_changed(self, change: AdapterChange) -> None:
        if change.kind is not ChangeKind.MOVED:
            self._note(change.version.key.name)

    def _restore(self, name: str, body: bytes) -> bool:
        """Restore one saved record.

        False: it could not be read; its adapter is FAILED and the record stays as it is.
        """
        try:
            self._registry.restore(name, msgspec.json.decode(body, type=AdapterRecord))
        except (msgspec.MsgspecError, ValueError) as error:
            problem = self._state.set_aside(STATE_KIND, name, body, error)
            with suppress(AdapterNotFound):  # not even its name can be one
                tenant, _, adapter_id = name.partition("/")
                spec = AdapterSpec(base_model="", source="")
                self._registry.register_missing(tenant, adapter_id, spec, [problem], "ADAPTER_UNREADABLE")
            return False
        return True
