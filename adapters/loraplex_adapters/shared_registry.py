"""The adapters that several replicas share, as one of them has them.

What exists, and what callers have set, is the same for all replicas: the shared record of each name. Whether a version
is loaded, and hence the moment at which an alias moves, is each replica's own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterChange, AdapterRecord, ChangeKind, NamedVersions
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import NO_DIGEST, AdapterState, AdapterVersion, checked_key

MOST_CLAIMS = 10**18 - 1
MOST_SECONDS = 1e11  # since the epoch


@dataclass(frozen=True, slots=True)
class Adopted:
    """What came of following a record, for others to do."""

    new: Sequence[AdapterVersion] = ()  # whose files have yet to be found and read
    repinned: Sequence[AdapterVersion] = ()  # whose pin has changed


class SharedAdapterRegistry(AdapterRegistry):
    """A registry that follows the shared records. Its etags are theirs, so that they hold at every replica."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self._etags: dict[AdapterKey, str] = {}  # of the versions in the shared records

    def shared(self, name: str, record: AdapterRecord | None) -> AdapterRecord | None:
        """The shared record of a name with what this replica knows of its versions: their state, and the alias.

        Versions that are being deleted, and are gone here, are left out.
        """
        own = self._adapters.get(name, NamedVersions())
        if record is None:
            return None
        versions = tuple(
            _with_own_state(version, own.versions.get(version.key.digest))
            for version in record.versions
            if version.state is not AdapterState.DELETING or version.key.digest in own.versions
        )
        digests = {version.key.digest for version in versions}
        claims = {digest: claim for digest, claim in record.claims.items() if digest in digests}
        known = [digest for digest in (record.current, own.current) if digest in digests]
        current = max(known, key=lambda digest: claims.get(digest or "", 0), default=None)
        return AdapterRecord(versions, claims, current) if versions else None

    def foresee_shared(
        self, name: str, record: AdapterRecord | None, change: Callable[[AdapterRegistry], object]
    ) -> AdapterRecord | None:
        """The record that a name will have after a change of what `shared` returns. Raises what the change raises."""
        copy = AdapterRegistry(self._clock)
        if record is not None:
            copy.restore(name, record)
        copy._sequence = self._sequence
        change(copy)
        return copy.record(name)

    def expect(self, name: str, record: AdapterRecord | None) -> None:
        """Take the etags of a shared record: those of the changes that come."""
        for key in [key for key in self._etags if key.name == name]:
            del self._etags[key]
        for version in () if record is None else record.versions:
            self._etags[version.key] = version.etag
            self._sequence = max(self._sequence, int(version.etag))

    def adopt(self, name: str, record: AdapterRecord | None) -> Adopted:
        """Follow the shared record of a name; None: there is none.

        Raises ValueError or AdapterNotFound for a record that is none; nothing has changed then.
        """
        wanted = _wanted(name, record)
        self.expect(name, record)
        if name not in self._adapters and not wanted:
            return Adopted()
        adapter = self._adapters.setdefault(name, NamedVersions())
        self._take_away(adapter, wanted)
        new = [self._add(adapter, version) for version in wanted.values() if _is_new(adapter, version)]
        changed = [version for version in wanted.values() if _is_changed(adapter, version)]
        repinned = [v.key for v in changed if adapter.versions[v.key.digest].spec.pinned is not v.spec.pinned]
        for version in changed:
            self._save(replace(adapter.versions[version.key.digest], spec=version.spec))
        if record is not None:
            self._take_alias(adapter, record)
        return Adopted([self._version(key) for key in new], [self._version(key) for key in repinned])

    def locate(self, key: AdapterKey, directory: str, fingerprint: str) -> AdapterVersion:
        """Note where the files of a version are here; "": they are the server's own copy. Raises AdapterNotFound."""
        return self._save(replace(self._version(key), directory=directory, fingerprint=fingerprint))

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _etag(self, key: AdapterKey) -> str:
        return self._etags.get(key) or super()._etag(key)

    def _take_away(self, adapter: NamedVersions, wanted: Mapping[str, AdapterVersion]) -> None:
        """Take versions out of service that nobody wants any more."""
        if wanted and (missing := adapter.versions.pop(NO_DIGEST, None)) is not None:
            self._publish(AdapterChange(ChangeKind.REMOVED, missing))
        if adapter.current not in wanted:
            adapter.current = None
        for digest, version in list(adapter.versions.items()):
            if digest not in wanted and not version.is_missing and version.state is not AdapterState.DELETING:
                adapter.claims.pop(digest, None)
                self._save(replace(version, state=AdapterState.DELETING))

    def _add(self, adapter: NamedVersions, version: AdapterVersion) -> AdapterKey:
        known = version.key.digest in adapter.versions
        new = replace(
            AdapterVersion.new(version.key, version.spec, version.create_time), text_digest=version.text_digest
        )
        return self._save(new, ChangeKind.CHANGED if known else ChangeKind.ADDED).key

    def _take_alias(self, adapter: NamedVersions, record: AdapterRecord) -> None:
        """Have the alias follow the claims of all replicas, as far as this one can use the versions."""
        adapter.claims = {digest: claim for digest, claim in record.claims.items() if digest in adapter.versions}
        self._sequence = max([self._sequence, *record.claims.values()])
        there = adapter.versions.get(record.current or "")
        if adapter.current is None and there is not None and there.state is not AdapterState.DELETING:
            adapter.current = there.key.digest
            self._save(there)
        self._follow_claims(adapter)


def _wanted(name: str, record: AdapterRecord | None) -> dict[str, AdapterVersion]:
    """The versions that shall be there, by digest. Raises ValueError, AdapterNotFound."""
    versions = () if record is None else record.versions
    for version in versions:
        tenant, _, adapter_id = version.key.name.partition("/")
        checked_key(tenant, adapter_id, version.key.digest)
        if version.key.name != name or version.is_missing:
            raise ValueError(f"it has a version that is none of {name!r}")
        if not re.fullmatch("[0-9]{1,18}", version.etag) or not 0 <= version.create_time < MOST_SECONDS:
            raise ValueError(f"it has a version with the etag {version.etag[:20]!r} of the time {version.create_time}")
    if record is not None and not record.claims.keys() <= {version.key.digest for version in versions}:
        raise ValueError("its alias is claimed by a version that it does not have")
    if record is not None and not all(0 < claim <= MOST_CLAIMS for claim in record.claims.values()):
        raise ValueError(f"its claims are not numbers from 1 to {MOST_CLAIMS}")
    return {version.key.digest: version for version in versions if version.state is not AdapterState.DELETING}


def _with_own_state(shared: AdapterVersion, own: AdapterVersion | None) -> AdapterVersion:
    if shared.state is AdapterState.DELETING:
        return shared
    if own is None or own.state is AdapterState.DELETING:
        return replace(shared, state=AdapterState.LOADING, info=None, problems=(), reason="")
    return replace(own, spec=shared.spec, create_time=shared.create_time, etag=shared.etag)


def _is_new(adapter: NamedVersions, version: AdapterVersion) -> bool:
    """Whether a version is not here yet, or was registered again after it had failed here."""
    known = adapter.versions.get(version.key.digest)
    return known is None or (known.state is AdapterState.FAILED and known.create_time != version.create_time)


def _is_changed(adapter: NamedVersions, version: AdapterVersion) -> bool:
    known = adapter.versions[version.key.digest]
    return known.state is not AdapterState.DELETING and (known.spec, known.etag) != (version.spec, version.etag)
