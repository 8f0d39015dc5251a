"""Replicas that share a database: what is changed at one is served by all."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraplex import Aborted, AsyncAdminClient, NotFound, ResourceExhausted, Unavailable
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_adapters.versions import AdapterState, AdapterVersion
from loraplex_service.admission.tenants import TenantConfig
from loraplex_service.fleet.database import Database
from loraplex_service.fleet.figures import FleetFigures
from loraplex_service.fleet.schema import FIRST, Step
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.fleet.conftest import TestDatabase
from tests.waits import MOST_SECONDS


class Fleet:
    """Replicas over one database, each with a state and adapter roots of its own."""

    def __init__(self, database: TestDatabase, model: Path, directory: Path, stack: AsyncExitStack) -> None:
        self.database = database
        self._model = model
        self._directory = directory
        self._stack = stack

    def starting(self, name: str, **settings: Any) -> AbstractAsyncContextManager[ControlPlane]:
        roots = self._directory / f"roots-{name}"
        roots.mkdir(exist_ok=True)
        settings = {"fleet_listen": "127.0.0.1:0", "state": self.database.dsn} | settings
        return control_plane(self._model, roots, state_directory=str(self._directory / f"state-{name}"), **settings)

    async def join(self, name: str, **settings: Any) -> ControlPlane:
        """A replica until the end of the test."""
        return await self._stack.enter_async_context(self.starting(name, **settings))


@pytest.fixture
async def fleet(database: TestDatabase, byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(database, byte_tokenizer_directory, tmp_path, stack)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what is to come within a second; the bound is generous."""
    async with asyncio.timeout(MOST_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def known(control: ControlPlane, name: str = "pirate") -> AdapterVersion | None:
    versions = control.app.registry.list_versions()
    return next((version for version in versions if version.name.endswith(f"/{name}")), None)


def version_of(control: ControlPlane) -> AdapterVersion:
    found = known(control)
    assert found is not None
    return found


def routes_of(control: ControlPlane) -> list[Route]:
    (servicer,) = (service.servicer for service in control.app.admin if service.name == "loraplex.v1.RouteService")
    routes: list[Route] = servicer._routes.all()
    return routes


def figures(control: ControlPlane) -> FleetFigures:
    assert control.app.replica is not None
    return control.app.replica.state.figures


def once(control: ControlPlane) -> AsyncAdminClient:
    """A client that does not try again."""
    return AsyncAdminClient(control.addresses.admin, options={"grpc.enable_retries": 0})


def tiny_route(name: str = "main", **fields: Any) -> Route:
    return Route(name=f"tenants/shared/routes/{name}", targets=[RouteTarget(model="tiny")], **fields)


def serves(control: ControlPlane, version: str, name: str = "pirate") -> Callable[[], bool]:
    def does() -> bool:
        found = known(control, name)
        return found is not None and found.version_name == version and found.current

    return does


async def upload(control: ControlPlane, directory: Path, seed: int = 0, name: str = "pirate") -> Adapter:
    files = write_adapter(directory / f"{name}-{seed}", seed=seed)
    return await control.admin.upload_adapter(name, directory=files, base_model="tiny", wait=MOST_SECONDS)


async def test_an_upload_at_one_replica_is_served_by_all(fleet: Fleet, tmp_path: Path) -> None:
    one, two, three = [await fleet.join(name) for name in ("one", "two", "three")]
    adapter = await upload(one, tmp_path)
    for other in (two, three):
        await until(serves(other, adapter.version))


async def test_a_deletion_at_another_replica_is_one_for_all(fleet: Fleet, tmp_path: Path) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    adapter = await upload(one, tmp_path)
    await until(serves(two, adapter.version))
    await two.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    await until(lambda: known(one) is None)
    with pytest.raises(NotFound):
        await one.admin.get_adapter("pirate")
    await until(lambda: fleet.database.ask("SELECT FROM loraplex_resources WHERE body IS NOT NULL") == [])
    again = await upload(one, tmp_path)
    await until(serves(two, again.version))


async def test_an_alias_that_moves_at_one_replica_moves_at_all(fleet: Fleet, tmp_path: Path) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    old = await upload(one, tmp_path, 0)
    new = await upload(two, tmp_path, 1)
    for control in (one, two):
        await until(serves(control, new.version))
    await one.admin.update_adapter("pirate", version=old.version)
    await until(serves(two, old.version))


async def test_labels_pins_and_etags_are_those_of_all_replicas(fleet: Fleet, tmp_path: Path) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    await until(serves(two, (await upload(one, tmp_path)).version))
    changed = await one.admin.update_adapter("pirate", labels={"team": "a"}, pinned=True)
    await until(lambda: version_of(two).spec.labels == {"team": "a"})
    found = await two.admin.get_adapter("pirate")
    assert (found.etag, found.pinned) == (changed.etag, True)
    again = await two.admin.update_adapter("pirate", labels={"team": "b"}, etag=changed.etag)
    with pytest.raises(Aborted):
        await one.admin.update_adapter("pirate", labels={"team": "c"}, etag=changed.etag)
    await until(lambda: version_of(one).etag == again.etag)


async def test_a_route_is_made_changed_and_deleted_at_any_replica(fleet: Fleet) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    await one.admin.update_route(tiny_route(), allow_missing=True)
    await until(lambda: len(routes_of(two)) == 1)
    await two.admin.update_route(tiny_route(labels={"a": "b"}))
    await until(lambda: dict(routes_of(one)[0].labels) == {"a": "b"})
    await one.admin.delete_route("main")
    await until(lambda: not routes_of(two))


async def test_of_changes_at_once_with_one_etag_one_counts(fleet: Fleet) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    made = await one.admin.update_route(tiny_route(), allow_missing=True)
    await until(lambda: len(routes_of(two)) == 1)
    ends = await asyncio.gather(
        *(
            control.admin.update_route(tiny_route(labels={"by": name}, etag=made.etag))
            for name, control in (("one", one), ("two", two))
        ),
        return_exceptions=True,
    )
    assert sorted(type(end).__name__ for end in ends) == ["Aborted", "Route"]


async def test_a_quota_of_routes_holds_over_all_replicas(fleet: Fleet) -> None:
    tenants = {"shared": TenantConfig(max_routes=5)}
    replicas = [await fleet.join(name, tenants=tenants) for name in ("one", "two")]
    ends = await asyncio.gather(
        *(
            replicas[number % 2].admin.update_route(tiny_route(f"r{number}"), allow_missing=True)
            for number in range(10)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(end, Route) for end in ends) == 5
    assert {type(end) for end in ends} == {Route, ResourceExhausted}


async def test_files_that_nobody_could_send_are_looked_for_again_in_the_next_life(fleet: Fleet, tmp_path: Path) -> None:
    async with fleet.starting("one", fleet_listen=None) as one, fleet.starting("two") as two:
        adapter = await upload(one, tmp_path)
        await until(lambda: known(two) is not None and version_of(two).state is AdapterState.FAILED)
    two = await fleet.join("two")
    await fleet.join("one")
    await until(serves(two, adapter.version))
    await until(lambda: version_of(two).state is AdapterState.ACTIVE)


async def test_a_replica_that_has_just_joined_is_asked_for_files(fleet: Fleet, tmp_path: Path) -> None:
    one = await fleet.join("one")
    two = await fleet.join("two")
    failed: list[str] = []
    one.app.registry.subscribe(
        lambda change: failed.append(change.version.name) if change.version.state is AdapterState.FAILED else None
    )
    adapter = await upload(two, tmp_path)
    await until(serves(one, adapter.version))
    await until(lambda: version_of(one).state is AdapterState.ACTIVE)
    assert not failed


async def test_a_replica_that_joins_later_has_everything(fleet: Fleet, tmp_path: Path) -> None:
    one = await fleet.join("one")
    old = await upload(one, tmp_path, 0)
    new = await upload(one, tmp_path, 1)
    await one.admin.update_adapter("pirate", version=old.version)
    await one.admin.update_route(tiny_route(), allow_missing=True)
    two = await fleet.join("two")
    assert len(routes_of(two)) == 1
    await until(serves(two, old.version))
    found = await two.admin.list_adapters(include_versions=True)
    assert {adapter.version for adapter in found} == {old.version, new.version}


async def test_what_a_server_had_on_its_own_it_brings_along(fleet: Fleet, tmp_path: Path) -> None:
    async with fleet.starting("one", state=None, fleet_listen=None) as alone:
        adapter = await upload(alone, tmp_path)
        await alone.admin.update_route(tiny_route(), allow_missing=True)
    one, two = await fleet.join("one"), await fleet.join("two")
    for control in (one, two):
        await until(serves(control, adapter.version))
        assert len(routes_of(control)) == 1


async def test_while_the_database_is_away_requests_are_served_and_changes_refused(fleet: Fleet, tmp_path: Path) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    adapter = await upload(one, tmp_path)
    await until(serves(two, adapter.version))
    fleet.database.take_away()
    async with once(one) as admin:
        with pytest.raises(Unavailable) as raised:
            await admin.update_adapter("pirate", labels={"team": "a"})
    assert raised.value.reason == "STATE_UNWRITABLE"
    assert (await two.client.generate("pirate", "x", max_tokens=2)).outputs
    fleet.database.give_back()
    await until(lambda: figures(one).connected and figures(two).connected)
    await one.admin.update_adapter("pirate", labels={"team": "b"})
    await until(lambda: version_of(two).spec.labels == {"team": "b"})


async def test_a_lost_connection_loses_no_change(fleet: Fleet) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    async with once(one) as admin:
        for number in range(5):
            fleet.database.cut()
            await until(lambda: figures(one).connected)
            try:
                await admin.update_route(tiny_route(f"r{number}"), allow_missing=True)
            except Unavailable:
                await until(lambda: figures(one).connected)
                await admin.update_route(tiny_route(f"r{number}"), allow_missing=True)
    await until(lambda: len(routes_of(two)) == 5)


@pytest.mark.slow
async def test_a_database_that_hangs_counts_as_away(fleet: Fleet) -> None:
    one = await fleet.join("one")
    fleet.database.stop()
    try:
        async with once(one) as admin:
            with pytest.raises(Unavailable):
                await admin.update_route(tiny_route(), allow_missing=True)
        await until(lambda: not figures(one).connected)
        assert (await one.client.generate("tiny", "x", max_tokens=2)).outputs
    finally:
        fleet.database.go_on()
    await until(lambda: figures(one).connected)


async def test_a_replica_starts_without_the_database_from_what_it_knew(fleet: Fleet, tmp_path: Path) -> None:
    two = await fleet.join("two")
    async with fleet.starting("one") as one:
        adapter = await upload(one, tmp_path)
    await until(serves(two, adapter.version))
    fleet.database.take_away()
    one = await fleet.join("one")
    assert serves(one, adapter.version)()
    fleet.database.give_back()
    await until(lambda: figures(two).connected)
    await two.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    await until(lambda: known(one) is None)


async def test_a_replica_that_has_never_joined_does_not_start_without_the_database(fleet: Fleet) -> None:
    fleet.database.take_away()
    with pytest.raises(OSError, match="state: the database cannot be used"):
        async with fleet.starting("one"):
            pass


async def test_rows_that_say_nothing_sensible_are_passed_over(fleet: Fleet) -> None:
    one, two = await fleet.join("one"), await fleet.join("two")
    hostile = {
        ("route", "nothing"): b"\xff",
        ("route", "tenants/shared/routes/main"): Route(name="tenants/other/routes/main").SerializeToString(),
        ("adapter", "shared/pirate"): b"{",
        ("adapter", "../../etc"): b'{"versions": [], "claims": {"x": 1}, "current": null}',
        ("of a newer version", "x"): b"?",
    }
    for (kind, name), body in hostile.items():
        fleet.database.ask("UPDATE loraplex_head SET last = last + 1")
        fleet.database.ask(
            "INSERT INTO loraplex_resources SELECT %s, %s, %s, last, 'nobody' FROM loraplex_head", kind, name, body
        )
    await until(lambda: figures(two).passed_over >= 4)
    await one.admin.update_route(tiny_route("fine"), allow_missing=True)
    await until(lambda: len(routes_of(two)) == 1)


async def test_deletions_of_long_ago_are_seen_by_who_was_away(fleet: Fleet) -> None:
    one = await fleet.join("one")
    async with fleet.starting("two") as two:
        await one.admin.update_route(tiny_route(), allow_missing=True)
        await until(lambda: len(routes_of(two)) == 1)
    await one.admin.delete_route("main")
    fleet.database.ask("UPDATE loraplex_changes SET made = now() - interval '10 days'")
    two = await fleet.join("two")
    assert not routes_of(two)
    assert fleet.database.ask("SELECT FROM loraplex_resources WHERE body IS NULL") == []


async def test_a_state_directory_of_another_fleet_is_refused(fleet: Fleet) -> None:
    async with fleet.starting("one"):
        pass
    fleet.database.ask("UPDATE loraplex_head SET fleet = 'another'")
    with pytest.raises(OSError, match="belongs to another fleet"):
        async with fleet.starting("one"):
            pass


async def test_replicas_are_upgraded_one_by_one_without_a_failed_call(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = await fleet.join("two")
    adds = Step(("ALTER TABLE loraplex_resources ADD COLUMN note text",), readable_by=1)
    calls = Calls([two])
    calling = asyncio.create_task(calls.go_on())
    async with fleet.starting("one") as one:
        adapter = await upload(one, tmp_path)
        await until(serves(two, adapter.version))
    monkeypatch.setattr("loraplex_service.replica.Database", partial(Database, steps=(FIRST, adds)))
    one = await fleet.join("one")
    assert fleet.database.ask("SELECT version FROM loraplex_schema") == [(2,)]
    calls.replicas.append(one)
    await two.admin.update_adapter("pirate", labels={"by": "the version before"})
    await until(lambda: version_of(one).spec.labels == {"by": "the version before"})
    await one.admin.update_adapter("pirate", labels={"by": "the new one"})
    await until(lambda: version_of(two).spec.labels == {"by": "the new one"})
    await until(lambda: calls.num > 20)
    calls.over = True
    await calling


class Calls:
    """Calls at all replicas in turn, until told to end. One that fails ends them with its error."""

    def __init__(self, replicas: list[ControlPlane]) -> None:
        self.replicas = replicas
        self.num = 0
        self.over = False

    async def go_on(self) -> None:
        while not self.over:
            for replica in list(self.replicas):
                await replica.client.generate("tiny", "x", max_tokens=2)
                self.num += 1
