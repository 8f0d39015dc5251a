"""The quota of adapters: how many versions, uploads and bytes each tenant has."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.files.source import weights_file
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import AdapterVersion
from loraplex_service.adapters.library import AdapterLibrary
from loraplex_service.admission.tenants import Tenants
from loraplex_service.state import State


@dataclass(slots=True, eq=False)
class Incoming:
    """An upload in progress: the number of bytes announced so far."""

    tenant: str
    size_bytes: int = 0


class AdapterQuota:
    """Raises QuotaExceeded before a tenant exceeds its quota. For one event loop."""

    def __init__(self, registry: AdapterRegistry, library: AdapterLibrary, tenants: Tenants, state: State) -> None:
        self._registry = registry
        self._library = library
        self._tenants = tenants
        self._state = state
        self._incoming: list[Incoming] = []

    @contextmanager
    def upload(self, tenant: str) -> Iterator[Incoming]:
        """Count one more upload for the length of the block."""
        self._tenants.get(tenant).check_uploads(1 + sum(one.tenant == tenant for one in self._incoming))
        incoming = Incoming(tenant)
        self._incoming.append(incoming)
        try:
            yield incoming
        finally:
            self._incoming.remove(incoming)

    def announce(self, incoming: Incoming, size_bytes: int) -> None:
        """Add the size of another file to an upload. Raises QuotaExceeded."""
        incoming.size_bytes += size_bytes
        self._check(incoming.tenant, self._held(incoming.tenant), incoming.size_bytes, incoming)

    def check(self, key: AdapterKey, directory: Path, state_bytes: int, incoming: Incoming | None = None) -> None:
        """Check the quota right before a version is registered, maybe again. `state_bytes`: the size of its record."""
        tenant = key.name.partition("/")[0]
        others = [version for version in self._held(tenant) if version.key != key]
        size = 0 if any(version.key.digest == key.digest for version in others) else _weight_bytes(directory)
        self._check(tenant, others, size, incoming)
        self.check_state(tenant, state_bytes)

    def check_state(self, tenant: str, more_bytes: int) -> None:
        """Check the quota before the records of a tenant grow by so many bytes."""
        if more_bytes > 0:
            self._tenants.get(tenant).check_state(self._state.size(tenant) + more_bytes)

    def _held(self, tenant: str) -> list[AdapterVersion]:
        versions = self._registry.list_versions({tenant}, include_versions=True)
        return [version for version in versions if not version.is_missing]

    def _check(self, tenant: str, held: list[AdapterVersion], size: int, incoming: Incoming | None) -> None:
        """Check the quota with one more version of this size. Equal files under several names count once."""
        others = [one for one in self._incoming if one.tenant == tenant and one is not incoming]
        directories = {version.key.digest: self._library.directory(version) for version in held}
        on_disk = sum(map(_weight_bytes, directories.values())) + sum(one.size_bytes for one in others)
        self._tenants.get(tenant).check_adapters(len(held) + len(others) + 1, on_disk + size)


def _weight_bytes(directory: Path) -> int:
    try:
        return weights_file(directory).stat().st_size
    except OSError:
        return 0  # the files have gone: then they take no room
