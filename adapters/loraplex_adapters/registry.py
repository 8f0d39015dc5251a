"""The adapters that exist: their versions, the version that each name means, and the state of each.

A version is named by the digest of its content and never changes. The bare name is an alias that moves atomically. A
new version is loaded while the alias still means the old one, and gets the alias when it can be used; if it cannot be
used, the alias stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from loraplex_adapters.errors import AdapterConflict
from loraplex_adapters.grammar import ADAPTER_NAME
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterChange, AdapterRecord, ChangeKind, NamedVersions
from loraplex_adapters.versions import (
    NO_DIGEST,
    VERSION_DIGITS,
    AdapterInfo,
    AdapterSpec,
    AdapterState,
    AdapterVersion,
    checked_key,
    no_adapter,
    resource_name,
)


class AdapterRegistry:
    """All adapters of all tenants. Does no I/O: the code that reads and loads reports the outcome here.

    Called from one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._adapters: dict[str, NamedVersions] = {}  # by key name: {tenant}/{adapter}
        self._subscribers: dict[int, Callable[[AdapterChange], None]] = {}
        self._sequence = 0  # numbers etags, claims and subscriptions

    # ---- restarts --------------------------------------------------------------------------------------------------

    def record(self, key_name: str) -> AdapterRecord | None:
        """The record from which `restore` brings a name back; None: there is nothing under the name."""
        adapter = self._adapters.get(key_name)
        versions = () if adapter is None else tuple(v for v in adapter.versions.values() if not v.is_missing)
        if adapter is None or not versions:
            return None
        return AdapterRecord(versions, dict(adapter.claims), adapter.current)

    def foresee(self, key_name: str, change: Callable[[AdapterRegistry], object]) -> AdapterRecord | None:
        """The record that a name will have after a change. Raises what the change raises."""
        copy = AdapterRegistry(self._clock)
        copy._sequence = self._sequence
        adapter = self._adapters.get(key_name)
        if adapter is not None:
            copy._adapters[key_name] = NamedVersions(dict(adapter.versions), dict(adapter.claims), adapter.current)
        change(copy)
        return copy.record(key_name)

    def restore(self, name: str, record: AdapterRecord) -> None:
        """Bring back the versions of a name from an earlier process. Subscribers are not told.

        Raises ValueError for an inconsistent record.
        """
        versions = {version.key.digest: replace(version, num_requests=0, num_waiting=0) for version in record.versions}
        if not versions or {version.key.name for version in record.versions} != {name}:
            raise ValueError(f"it has no versions, or versions of other names than {name!r}")
        if not {*record.claims, record.current or next(iter(versions))} <= versions.keys():
            raise ValueError("its alias names a version that it does not have")
        etags = [int(version.etag) for version in record.versions]
        self._adapters[name] = NamedVersions(versions, dict(record.claims), record.current)
        self._sequence = max(self._sequence, *etags, *record.claims.values())

    def recheck(self, key: AdapterKey) -> AdapterVersion:
        """Set a version to LOADING, because its files will be read and checked again. Its labels, pin and alias stay.

        Raises AdapterNotFound.
        """
        version = self._version(key)
        assert version.state is not AdapterState.DELETING
        return self._save(replace(version, state=AdapterState.LOADING, problems=(), reason=""))

    # ---- life ------------------------------------------------------------------------------------------------------

    def register(
        self,
        tenant: str,
        adapter_id: str,
        digest: str,
        spec: AdapterSpec,
        directory: str = "",
        fingerprint: str = "",
        text_digest: str = "",
    ) -> AdapterVersion:
        """Make a version known, in LOADING. The same digest again returns it as it is, with its files where they are
        now; if it had FAILED it is retried.

        Raises AdapterConflict if the digest is registered for another model or is being deleted, or if another digest
        has the same first digits; AdapterNotFound for a malformed id.
        """
        key = checked_key(tenant, adapter_id, digest)
        adapter = self._adapters.setdefault(key.name, NamedVersions())
        missing = adapter.versions.pop(NO_DIGEST, None)
        if missing is not None:
            self._publish(AdapterChange(ChangeKind.REMOVED, missing))
        known = adapter.versions.get(digest)
        if known is not None:
            _check_same(known, spec)
        elif any(other.startswith(digest[:VERSION_DIGITS]) for other in adapter.versions):
            raise AdapterConflict(f"{resource_name(key)}: another digest begins with {digest[:VERSION_DIGITS]}")
        if spec.make_current:
            adapter.claims[digest] = self._next()
        if known is not None and known.state is not AdapterState.FAILED:
            if known.directory != directory:
                moved = replace(known.spec, source=spec.source)
                self._save(replace(known, spec=moved, directory=directory, fingerprint=fingerprint))
            self._follow_claims(adapter)
            return adapter.versions[digest]
        version = replace(
            AdapterVersion.new(key, spec, self._clock()),
            directory=directory,
            fingerprint=fingerprint,
            text_digest=text_digest,
        )
        return self._save(version, ChangeKind.ADDED if known is None else ChangeKind.CHANGED)

    def register_missing(
        self, tenant: str, adapter_id: str, spec: AdapterSpec, problems: Sequence[str], reason: str
    ) -> AdapterVersion:
        """Add a FAILED version for an adapter whose files or record are missing. It goes when files are registered.

        Raises AdapterNotFound for a malformed id.
        """
        key = checked_key(tenant, adapter_id, NO_DIGEST)
        self._adapters.setdefault(key.name, NamedVersions())
        version = replace(
            AdapterVersion.new(key, spec, self._clock()),
            state=AdapterState.FAILED,
            problems=tuple(problems),
            reason=reason,
        )
        return self._save(version, ChangeKind.ADDED)

    def activate(self, key: AdapterKey, info: AdapterInfo) -> AdapterVersion:
        """Set a version to ACTIVE. The alias moves to it if it was the last to claim it. Raises AdapterNotFound."""
        version = self._version(key)
        if version.state is AdapterState.DELETING:
            return version
        self._save(replace(version, state=AdapterState.ACTIVE, info=info, problems=(), reason=""))
        self._follow_claims(self._adapters[key.name])
        return self._version(key)

    def fail(self, key: AdapterKey, problems: Sequence[str], reason: str = "ADAPTER_INVALID") -> AdapterVersion:
        """Set a version to FAILED. `reason`: a name of loraplex.v1.ErrorReason.

        An alias that meant it stays on it: a name never means another version by accident. Raises AdapterNotFound.
        """
        version = self._version(key)
        if version.state is AdapterState.DELETING:
            return version
        return self._save(replace(version, state=AdapterState.FAILED, problems=tuple(problems), reason=reason))

    def delete(self, name: str, etag: str | None = None) -> list[AdapterVersion]:
        """Take a version, or all versions of a bare name, out of service: new requests are refused. `remove` follows.

        Raises AdapterNotFound; AdapterConflict for another etag, or for the current version while others are there.
        """
        _check_etag(self.get(name), etag)
        adapter, versions = self._named(name)
        alive = [other for other in adapter.versions.values() if other.state is not AdapterState.DELETING]
        if any(version.current for version in versions) and len(versions) < len(alive):
            raise AdapterConflict(f"{name}: it is the current version; move the alias to another version first")
        adapter.current = None if len(versions) == len(alive) else adapter.current
        return [self._save(replace(version, state=AdapterState.DELETING)) for version in versions]

    def remove(self, key: AdapterKey) -> None:
        """Forget a version that is being deleted, once nothing uses it. Raises AdapterNotFound, AdapterConflict."""
        version = self._version(key)
        if version.state is not AdapterState.DELETING or version.num_requests:
            raise AdapterConflict(
                f"{version.version_name}: {version.state.value}, {version.num_requests} requests use it"
            )
        adapter = self._adapters[key.name]
        del adapter.versions[key.digest]
        adapter.claims.pop(key.digest, None)
        if not adapter.versions:
            del self._adapters[key.name]
        self._publish(AdapterChange(ChangeKind.REMOVED, version))

    # ---- changes by the operator -----------------------------------------------------------------------------------

    def update(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        pinned: bool | None = None,
        etag: str | None = None,
        default_constraint: bytes | None = None,
    ) -> AdapterVersion:
        """Change what is given; None: leave as it is. Raises AdapterNotFound, AdapterConflict for another etag."""
        version = self.get(name)
        _check_etag(version, etag)
        spec = version.spec
        spec = replace(
            spec,
            labels=spec.labels if labels is None else dict(labels),
            pinned=spec.pinned if pinned is None else pinned,
            default_constraint=spec.default_constraint if default_constraint is None else default_constraint,
        )
        return self._save(replace(version, spec=spec))

    def set_current(self, version_name: str, etag: str | None = None) -> AdapterVersion:
        """Move the alias to a version, such as back to the one before. Raises AdapterNotFound, AdapterConflict."""
        version = self.get(version_name)
        _check_etag(version, etag)
        adapter = self._adapters[version.key.name]
        if version.state is not AdapterState.ACTIVE:
            raise AdapterConflict(
                f"{version.version_name}: {version.state.value}, only an active version can be current"
            )
        adapter.claims[version.key.digest] = self._next()
        self._follow_claims(adapter)
        return self._version(version.key)

    # ---- questions -------------------------------------------------------------------------------------------------

    def get(self, name: str) -> AdapterVersion:
        """The version with this resource name; for a bare name the current one, or else the newest.

        Raises AdapterNotFound.
        """
        _, versions = self._named(name)
        return next((version for version in versions if version.current), versions[-1])

    def list_versions(
        self, tenants: set[str] | None = None, base_model: str | None = None, include_versions: bool = False
    ) -> list[AdapterVersion]:
        """Every version, or only the one that `get` returns of each name, by name and version. `tenants` None: all."""
        found: list[AdapterVersion] = []
        for key_name, adapter in self._adapters.items():
            if tenants is not None and key_name.partition("/")[0] not in tenants:
                continue
            versions = list(adapter.versions.values())
            found.extend(versions if include_versions else [self.get(versions[0].name)])
        matching = [version for version in found if base_model in (None, version.spec.base_model)]
        return sorted(matching, key=lambda version: version.version_name)

    def requests(self, base_model: str) -> list[tuple[AdapterKey, int]]:
        """The number of requests of each version of this model that has any."""
        versions = (version for adapter in self._adapters.values() for version in adapter.versions.values())
        return [(v.key, v.num_requests) for v in versions if v.num_requests and v.spec.base_model == base_model]

    # ---- use and news ----------------------------------------------------------------------------------------------

    def begin_request(self, key: AdapterKey) -> None:
        """Count a request that was resolved to this version; it waits. Raises AdapterNotFound."""
        version = self._version(key)
        self._store(
            replace(
                version,
                num_requests=version.num_requests + 1,
                num_waiting=version.num_waiting + 1,
                last_use_time=self._clock(),
            )
        )

    def start_request(self, key: AdapterKey) -> None:
        """Note that a request has its first token, and no longer waits."""
        version = self._version(key)
        assert version.num_waiting > 0, f"more requests of {key} started than waited"
        self._store(replace(version, num_waiting=version.num_waiting - 1))

    def end_request(self, key: AdapterKey, started: bool = False) -> None:
        """Note the end of a request. `started`: `start_request` was called for it. Subscribers are told if it was
        the last one of a version that is being deleted."""
        version = self._version(key)
        assert version.num_requests > 0, f"more requests of {key} ended than began"
        num_waiting = version.num_waiting if started else version.num_waiting - 1
        version = replace(version, num_requests=version.num_requests - 1, num_waiting=num_waiting)
        self._store(version)
        if version.state is AdapterState.DELETING and not version.num_requests:
            self._publish(AdapterChange(ChangeKind.CHANGED, version))

    def moved(self, key: AdapterKey) -> None:
        """Tell subscribers that a version is in another tier of its engine now, if the version is known."""
        adapter = self._adapters.get(key.name)
        version = None if adapter is None else adapter.versions.get(key.digest)
        if version is not None:
            self._publish(AdapterChange(ChangeKind.MOVED, version))

    def subscribe(self, callback: Callable[[AdapterChange], None]) -> Callable[[], None]:
        """Call `callback`, which must not block, with every change, in order. Returns a function that ends this."""
        number = self._next()
        self._subscribers[number] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(number, None)

        return unsubscribe

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> tuple[NamedVersions, list[AdapterVersion]]:
        """The adapter of a resource name, and the versions that the name covers: one, or all that are not DELETING."""
        found = ADAPTER_NAME.fullmatch(name)
        if found is not None:
            adapter = self._adapters.get(f"{found['tenant']}/{found['adapter']}")
            if adapter is not None:
                prefix = found["version"] or ""
                versions = [version for digest, version in adapter.versions.items() if digest.startswith(prefix)]
                staying = [version for version in versions if version.state is not AdapterState.DELETING]
                if versions:
                    return adapter, staying if staying and not prefix else versions
        raise no_adapter(name)

    def _version(self, key: AdapterKey) -> AdapterVersion:
        adapter = self._adapters.get(key.name)
        version = adapter.versions.get(key.digest) if adapter is not None else None
        if version is None:
            raise no_adapter(str(key))
        return version

    def _follow_claims(self, adapter: NamedVersions) -> None:
        """Move the alias to the usable version that claimed it last."""
        claims, before = adapter.claims, adapter.current
        usable = [digest for digest in claims if adapter.versions[digest].state is AdapterState.ACTIVE]
        winner = max(usable, key=lambda digest: claims[digest], default=None)
        if winner is None or claims[winner] <= claims.get(before or "", 0):
            return
        adapter.current = winner
        if before is not None:
            self._save(adapter.versions[before])
        self._save(adapter.versions[winner])

    def _save(self, version: AdapterVersion, kind: ChangeKind = ChangeKind.CHANGED) -> AdapterVersion:
        """Keep a new snapshot, with a new etag, and tell the subscribers."""
        current = self._adapters[version.key.name].current == version.key.digest
        version = replace(version, current=current, update_time=self._clock(), etag=self._etag(version.key))
        self._store(version)
        self._publish(AdapterChange(kind, version))
        return version

    def _etag(self, key: AdapterKey) -> str:
        return str(self._next())

    def _store(self, version: AdapterVersion) -> None:
        self._adapters[version.key.name].versions[version.key.digest] = version

    def _publish(self, change: AdapterChange) -> None:
        for callback in list(self._subscribers.values()):
            callback(change)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


def _check_etag(version: AdapterVersion, etag: str | None) -> None:
    if etag and etag != version.etag:
        raise AdapterConflict(f"{version.version_name}: it has changed since; its etag is {version.etag}, not {etag}")


def _check_same(known: AdapterVersion, spec: AdapterSpec) -> None:
    if known.state is AdapterState.DELETING:
        raise AdapterConflict(f"{known.version_name}: it is being deleted; register it again once it is gone")
    if known.spec.base_model != spec.base_model:
        raise AdapterConflict(
            f"{known.version_name}: it is registered for model {known.spec.base_model!r}, not {spec.base_model!r}"
        )
