"""A replica's registry follows the records that all replicas share, and none that is hostile."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterRecord
from loraplex_adapters.shared_registry import SharedAdapterRegistry
from loraplex_adapters.versions import AdapterInfo, AdapterSpec, AdapterState, AdapterVersion

NAME, OLD, NEW = "acme/legal", "a" * 64, "b" * 64
BARE = "tenants/acme/adapters/legal"
INFO = AdapterInfo(rank=8, size_bytes=100, target_modules=("q_proj",))


def record(current: str | None, claims: Mapping[str, int], *digests: str) -> AdapterRecord:
    source = SharedAdapterRegistry(lambda: 1.0)
    for digest in digests:
        source.register("acme", "legal", digest, AdapterSpec(base_model="llama", source=""))
    made = source.record(NAME)
    assert made is not None
    return AdapterRecord(made.versions, claims, current)


@pytest.fixture
def registry() -> SharedAdapterRegistry:
    """Serves OLD, and loads NEW, which is meant to be the current one."""
    registry = SharedAdapterRegistry(lambda: 1.0)
    adopted = registry.adopt(NAME, record(OLD, {OLD: 1, NEW: 2}, OLD, NEW))
    assert [version.key.digest for version in adopted.new] == [OLD, NEW]
    registry.activate(adopted.new[0].key, INFO)
    return registry


def test_the_alias_moves_when_this_replica_can_use_the_version(registry: SharedAdapterRegistry) -> None:
    assert registry.get(BARE).key.digest == OLD
    registry.activate(registry.get(f"{BARE}@{NEW}").key, INFO)
    assert registry.get(BARE).key.digest == NEW


def test_a_version_that_nobody_wants_any_more_takes_no_requests(registry: SharedAdapterRegistry) -> None:
    registry.adopt(NAME, record(NEW, {NEW: 2}, NEW))
    assert registry.get(f"{BARE}@{OLD}").state is AdapterState.DELETING
    assert registry.get(BARE).key.digest == NEW


def test_what_is_unknown_here_of_a_record_comes_from_this_replica(registry: SharedAdapterRegistry) -> None:
    shared = registry.shared(NAME, record(NEW, {OLD: 3, NEW: 2}, OLD, NEW))
    assert shared is not None
    assert {version.key.digest: version.state for version in shared.versions} == {
        OLD: AdapterState.ACTIVE,
        NEW: AdapterState.LOADING,
    }
    assert shared.current == OLD


def test_what_happens_here_changes_no_etag(registry: SharedAdapterRegistry) -> None:
    before = registry.get(f"{BARE}@{NEW}")
    after = registry.activate(before.key, INFO)
    assert (after.state, after.etag) == (AdapterState.ACTIVE, before.etag)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda version: replace(version, etag="x"),
        lambda version: replace(version, etag="9" * 5000),
        lambda version: replace(version, create_time=float("nan")),
        lambda version: replace(version, key=AdapterKey("other/legal", OLD)),
        lambda version: replace(version, key=AdapterKey(NAME, "../../etc")),
    ],
)
def test_a_record_that_is_none_changes_nothing(
    registry: SharedAdapterRegistry, spoil: Callable[[AdapterVersion], AdapterVersion]
) -> None:
    before = registry.list_versions(include_versions=True)
    good = record(OLD, {}, OLD)
    with pytest.raises((ValueError, AdapterNotFound)):
        registry.adopt(NAME, replace(good, versions=tuple(map(spoil, good.versions))))
    with pytest.raises(ValueError, match="claims"):
        registry.adopt(NAME, replace(good, claims={OLD: 10**4000}))
    assert registry.list_versions(include_versions=True) == before
