from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex_adapters.errors import AdapterConflict, AdapterError, AdapterNotFound
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterChange, ChangeKind
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import AdapterInfo, AdapterSpec, AdapterState, AdapterVersion

INFO = AdapterInfo(rank=8, size_bytes=1000, target_modules=("q_proj",))
SPEC = AdapterSpec(base_model="demo", source="pirate")


def digest(name: str) -> str:
    return (name * 64)[:64]


def version_name(name: str, tenant: str = "acme", adapter: str = "pirate") -> str:
    return f"tenants/{tenant}/adapters/{adapter}@{digest(name)[:12]}"


BARE = "tenants/acme/adapters/pirate"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry(Clock())


@pytest.fixture
def add(registry: AdapterRegistry) -> Callable[..., AdapterKey]:
    """Registers and activates a version."""

    def add(name: str, tenant: str = "acme", adapter: str = "pirate", **spec: object) -> AdapterKey:
        version = registry.register(tenant, adapter, digest(name), AdapterSpec("demo", "src", **spec))  # type: ignore[arg-type]
        registry.activate(version.key, INFO)
        return version.key

    return add


Add = Callable[..., AdapterKey]


# ---- life ------------------------------------------------------------------------------------------------------------


def test_a_new_version_is_loading_and_becomes_the_current_one_when_active(registry: AdapterRegistry) -> None:
    version = registry.register("acme", "pirate", digest("a"), SPEC)
    assert (version.state, version.current, version.info) == (AdapterState.LOADING, False, None)
    assert version.name == BARE
    assert version.version_name == f"{BARE}@aaaaaaaaaaaa"
    version = registry.activate(version.key, INFO)
    assert (version.state, version.current, version.info) == (AdapterState.ACTIVE, True, INFO)


def test_the_same_digest_again_is_a_no_op(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    before = registry.get(BARE)
    assert registry.register("acme", "pirate", digest("a"), AdapterSpec("demo", "elsewhere")) == before
    assert registry.get(BARE) == before
    assert before.key == key


def test_the_alias_means_the_old_version_until_the_new_one_is_active(registry: AdapterRegistry, add: Add) -> None:
    old = add("a")
    new = registry.register("acme", "pirate", digest("b"), SPEC).key
    assert registry.get(BARE).key == old
    registry.activate(new, INFO)
    assert registry.get(BARE).key == new
    assert not registry.get(version_name("a")).current
    assert registry.get(version_name("b")).current


def test_the_alias_stays_when_the_new_version_fails(registry: AdapterRegistry, add: Add) -> None:
    old = add("a")
    new = registry.register("acme", "pirate", digest("b"), SPEC).key
    failed = registry.fail(new, ["14 tensors bind to nothing"])
    assert failed.problems == ("14 tensors bind to nothing",)
    assert registry.get(BARE).key == old


def test_the_version_registered_last_wins_however_the_loads_end(registry: AdapterRegistry) -> None:
    first = registry.register("acme", "pirate", digest("a"), SPEC).key
    second = registry.register("acme", "pirate", digest("b"), SPEC).key
    registry.activate(second, INFO)
    registry.activate(first, INFO)
    assert registry.get(BARE).key == second


def test_a_version_that_is_not_to_be_current_leaves_the_alias(registry: AdapterRegistry, add: Add) -> None:
    old = add("a")
    new = add("b", make_current=False)
    assert registry.get(BARE).key == old
    assert registry.get(version_name("b")).key == new


def test_a_failed_version_that_is_registered_again_loads_again(registry: AdapterRegistry) -> None:
    key = registry.register("acme", "pirate", digest("a"), SPEC).key
    registry.fail(key, ["no"])
    assert registry.register("acme", "pirate", digest("a"), SPEC).state is AdapterState.LOADING
    assert registry.activate(key, INFO).problems == ()


def test_a_current_version_that_fails_does_not_hand_its_name_to_another(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    current = add("b")
    registry.fail(current, ["the disk is gone"])
    add("c", make_current=False)
    assert (registry.get(BARE).key, registry.get(BARE).problems) == (current, ("the disk is gone",))


def test_registering_an_older_version_again_moves_the_alias_back(registry: AdapterRegistry, add: Add) -> None:
    old = add("a")
    add("b")
    assert registry.register("acme", "pirate", digest("a"), SPEC).current
    assert registry.get(BARE).key == old


def test_another_model_for_the_same_version_is_a_conflict(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    with pytest.raises(AdapterConflict, match="registered for model 'demo', not 'other'"):
        registry.register("acme", "pirate", digest("a"), AdapterSpec("other", "src"))


def test_two_digests_with_the_same_first_digits_are_a_conflict(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    with pytest.raises(AdapterConflict, match="another digest"):
        registry.register("acme", "pirate", "a" * 12 + "b" * 52, SPEC)


@pytest.mark.parametrize(
    ("tenant", "adapter", "content"),
    [
        ("acme", "Pirate", digest("a")),
        ("acme", "", digest("a")),
        ("acme", "-x", digest("a")),
        ("acme", "a/b", digest("a")),
        ("acme", "a@b", digest("a")),
        ("acme", "a" * 64, digest("a")),
        ("acme", "pirate\n", digest("a")),
        ("../x", "pirate", digest("a")),
        ("acme", "pirate", "a" * 63),
        ("acme", "pirate", "A" * 64),
    ],
)
def test_ids_that_could_never_be_named_are_refused(
    registry: AdapterRegistry, tenant: str, adapter: str, content: str
) -> None:
    with pytest.raises(AdapterNotFound):
        registry.register(tenant, adapter, content, SPEC)
    assert registry.list_versions() == []


# ---- deletion --------------------------------------------------------------------------------------------------------


def test_a_deleted_adapter_takes_no_requests_and_is_gone_when_removed(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    (version,) = registry.delete(BARE)
    assert (version.state, version.current) == (AdapterState.DELETING, False)
    assert registry.get(BARE).state is AdapterState.DELETING
    registry.remove(key)
    with pytest.raises(AdapterNotFound):
        registry.get(BARE)


def test_running_requests_keep_a_version_that_is_being_deleted(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    registry.begin_request(key)
    registry.delete(BARE)
    with pytest.raises(AdapterConflict, match="1 requests use it"):
        registry.remove(key)
    drained: list[AdapterChange] = []
    registry.subscribe(drained.append)
    registry.end_request(key)
    (change,) = drained
    assert (change.version.key, change.version.num_requests) == (key, 0)
    registry.remove(key)


def test_the_current_version_cannot_be_deleted_while_others_are_there(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    add("b")
    with pytest.raises(AdapterConflict, match="current version"):
        registry.delete(version_name("b"))
    registry.delete(version_name("a"))
    registry.delete(version_name("b"))


def test_a_bare_name_deletes_every_version(registry: AdapterRegistry, add: Add) -> None:
    keys = {add("a"), add("b")}
    assert {version.key for version in registry.delete(BARE)} == keys


def test_a_version_that_is_not_being_deleted_cannot_be_removed(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    with pytest.raises(AdapterConflict, match="active"):
        registry.remove(key)


def test_a_load_that_ends_after_deletion_changes_nothing(registry: AdapterRegistry) -> None:
    key = registry.register("acme", "pirate", digest("a"), SPEC).key
    registry.delete(BARE)
    assert registry.activate(key, INFO).state is AdapterState.DELETING
    assert registry.fail(key, ["late"]).state is AdapterState.DELETING


def test_a_version_that_is_being_deleted_cannot_be_registered_again(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    registry.delete(BARE)
    with pytest.raises(AdapterConflict, match="being deleted"):
        registry.register("acme", "pirate", digest("a"), SPEC)


def test_a_new_version_may_come_while_the_old_one_is_being_deleted(registry: AdapterRegistry, add: Add) -> None:
    old = add("a")
    registry.delete(BARE)
    new = add("b")
    assert registry.get(BARE).key == new
    registry.remove(old)
    assert [version.key for version in registry.list_versions(include_versions=True)] == [new]


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BARE, f"{BARE}@{'a' * 12}", f"{BARE}@{'a' * 64}"])
def test_every_name_of_an_adapter_means_it(registry: AdapterRegistry, add: Add, name: str) -> None:
    add("b", tenant="rival")
    key = add("a")
    assert registry.get(name).key == key


@pytest.mark.parametrize(
    "name",
    [
        "pirate",
        "tenants/acme/adapters/unknown",
        f"{BARE}@{'c' * 12}",
        f"{BARE}@{'a' * 11}",
        "tenants/rival/adapters/pirate",
        "tenants/acme/adapters/",
        f"{BARE}@",
        f"{BARE}\n",
        "",
        "x" * 10_000,
    ],
)
def test_what_does_not_exist_is_not_found(registry: AdapterRegistry, add: Add, name: str) -> None:
    add("a")
    with pytest.raises(AdapterNotFound):
        registry.get(name)


def test_an_adapter_that_never_was_current_is_meant_by_its_name(registry: AdapterRegistry) -> None:
    key = registry.register("acme", "pirate", digest("a"), SPEC).key
    assert (registry.get(BARE).key, registry.get(BARE).state) == (key, AdapterState.LOADING)
    registry.fail(key, ["rank 8 but 4", "NaN"])
    assert registry.get(BARE).problems == ("rank 8 but 4", "NaN")


# ---- changes ---------------------------------------------------------------------------------------------------------


def test_labels_and_pinning_change_with_a_new_etag(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    before = registry.get(BARE)
    after = registry.update(BARE, labels={"team": "legal"}, pinned=True, etag=before.etag)
    assert (dict(after.spec.labels), after.spec.pinned) == ({"team": "legal"}, True)
    assert after.etag != before.etag
    assert after.update_time > before.update_time
    assert registry.update(BARE, pinned=False).spec.labels == {"team": "legal"}


@pytest.mark.parametrize("change", [AdapterRegistry.update, AdapterRegistry.delete, AdapterRegistry.set_current])
def test_a_stale_etag_changes_nothing(registry: AdapterRegistry, add: Add, change: Callable[..., object]) -> None:
    add("a")
    etag = registry.get(BARE).etag
    now = registry.update(BARE, pinned=True)
    with pytest.raises(AdapterConflict, match="changed since"):
        change(registry, BARE, etag=etag)
    assert registry.get(BARE) == now


def test_the_alias_can_be_moved_back(registry: AdapterRegistry, add: Add) -> None:
    old = add("a")
    add("b")
    assert registry.set_current(version_name("a")).current
    assert registry.get(BARE).key == old


def test_the_alias_cannot_move_to_a_version_that_cannot_be_used(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    registry.register("acme", "pirate", digest("b"), SPEC)
    with pytest.raises(AdapterConflict, match="only an active version"):
        registry.set_current(version_name("b"))


def test_the_versions_of_a_model_that_are_used_are_told(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    key = add("b")
    registry.begin_request(key)
    assert registry.requests("demo") == [(key, 1)]
    assert registry.requests("other") == []


def test_use_is_counted_and_timed_without_a_new_etag(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    before = registry.get(BARE)
    registry.begin_request(key)
    during = registry.get(BARE)
    assert (during.num_requests, during.num_waiting, during.etag) == (1, 1, before.etag)
    assert during.last_use_time is not None
    registry.begin_request(key)
    registry.start_request(key)
    during = registry.get(BARE)
    assert (during.num_requests, during.num_waiting) == (2, 1)
    registry.end_request(key, started=True)
    registry.end_request(key)
    after = registry.get(BARE)
    assert (after.num_requests, after.num_waiting) == (0, 0)


# ---- lists and news --------------------------------------------------------------------------------------------------


def test_a_list_has_the_current_version_of_each_adapter_in_order(registry: AdapterRegistry, add: Add) -> None:
    add("a")
    add("b")
    add("c", adapter="bard")
    add("d", tenant="rival")
    names = [version.version_name for version in registry.list_versions({"acme"})]
    assert names == [version_name("c", adapter="bard"), version_name("b")]
    assert len(registry.list_versions({"acme"}, include_versions=True)) == 3
    assert len(registry.list_versions()) == 3
    assert registry.list_versions(base_model="other") == []


def test_subscribers_hear_every_change_until_they_leave(registry: AdapterRegistry, add: Add) -> None:
    heard: list[tuple[ChangeKind, str, AdapterState, bool]] = []

    def hear(change: AdapterChange) -> None:
        version = change.version
        heard.append((change.kind, version.key.digest[0], version.state, version.current))

    unsubscribe = registry.subscribe(hear)
    add("a")
    add("b")
    assert heard == [
        (ChangeKind.ADDED, "a", AdapterState.LOADING, False),
        (ChangeKind.CHANGED, "a", AdapterState.ACTIVE, False),
        (ChangeKind.CHANGED, "a", AdapterState.ACTIVE, True),
        (ChangeKind.ADDED, "b", AdapterState.LOADING, False),
        (ChangeKind.CHANGED, "b", AdapterState.ACTIVE, False),
        (ChangeKind.CHANGED, "a", AdapterState.ACTIVE, False),
        (ChangeKind.CHANGED, "b", AdapterState.ACTIVE, True),
    ]
    unsubscribe()
    unsubscribe()
    registry.delete(BARE)
    assert len(heard) == 7


def test_removal_is_news_too(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    registry.delete(BARE)
    heard: list[AdapterChange] = []
    registry.subscribe(heard.append)
    registry.remove(key)
    assert [change.kind for change in heard] == [ChangeKind.REMOVED]


def test_a_move_is_news_of_a_version_that_is_known_and_no_change_of_it(registry: AdapterRegistry, add: Add) -> None:
    key = add("a")
    before = registry.get(BARE)
    heard: list[AdapterChange] = []
    registry.subscribe(heard.append)
    registry.moved(key)
    registry.moved(AdapterKey(key.name, digest("b")))
    registry.moved(AdapterKey("acme/nobody", digest("a")))
    assert heard == [AdapterChange(ChangeKind.MOVED, before)]


class RegistryMachine(RuleBasedStateMachine):
    """Any order of calls: what subscribers heard is what there is, and a name means at most one version."""

    names = st.sampled_from("abcd")

    def __init__(self) -> None:
        super().__init__()
        self.registry = AdapterRegistry(Clock())
        self.heard: dict[AdapterKey, AdapterVersion] = {}
        self.registry.subscribe(self.hear)

    def hear(self, change: AdapterChange) -> None:
        if change.kind is ChangeKind.REMOVED:
            del self.heard[change.version.key]
        else:
            assert (change.kind is ChangeKind.ADDED) == (change.version.key not in self.heard)
            self.heard[change.version.key] = change.version

    def attempt(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except AdapterError:
            return

    @rule(name=names, make_current=st.booleans())
    def register(self, name: str, make_current: bool) -> None:
        spec = AdapterSpec("demo", "src", make_current=make_current)
        self.attempt(self.registry.register, "acme", "pirate", digest(name), spec)

    @rule(name=names)
    def activate(self, name: str) -> None:
        self.attempt(self.registry.activate, AdapterKey("acme/pirate", digest(name)), INFO)

    @rule(name=names)
    def fail(self, name: str) -> None:
        self.attempt(self.registry.fail, AdapterKey("acme/pirate", digest(name)), ["no"])

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.attempt(self.registry.delete, version_name(name))

    @rule()
    def delete_all(self) -> None:
        self.attempt(self.registry.delete, BARE)

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.attempt(self.registry.remove, AdapterKey("acme/pirate", digest(name)))

    @rule(name=names)
    def set_current(self, name: str) -> None:
        self.attempt(self.registry.set_current, version_name(name))

    @invariant()
    def subscribers_know_what_there_is(self) -> None:
        assert {version.key: version for version in self.registry.list_versions(include_versions=True)} == self.heard

    @invariant()
    def a_name_means_the_current_version_or_else_the_newest_that_stays(self) -> None:
        current = [version for version in self.heard.values() if version.current]
        assert len(current) <= 1
        assert all(version.state is not AdapterState.DELETING for version in current)
        if not self.heard:
            with pytest.raises(AdapterNotFound):
                self.registry.get(BARE)
            return
        found = self.registry.get(BARE)
        if current:
            assert found == current[0]
        elif any(version.state is not AdapterState.DELETING for version in self.heard.values()):
            assert found.state is not AdapterState.DELETING


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
