"""A service that starts again knows what it knew, and makes the rest follow."""

import dataclasses
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path

import pytest
from grpc import StatusCode

from loraplex import AsyncAdminClient, FailedPrecondition, Unavailable
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.admission.tenants import TenantConfig
from loraplex_service.state import FILE_NAME
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

Start = Callable[..., AbstractAsyncContextManager[ControlPlane]]


@pytest.fixture
def start(byte_tokenizer_directory: Path, tmp_path: Path) -> Start:
    """Starts a service on the same state and the same adapter root as the last one."""
    roots = tmp_path / "roots"
    roots.mkdir()

    def start(
        adapters: tuple[AdapterConfig, ...] = (), tenants: dict[str, TenantConfig] | None = None
    ) -> AbstractAsyncContextManager[ControlPlane]:
        return control_plane(
            byte_tokenizer_directory,
            roots,
            adapters=adapters,
            state_directory=str(tmp_path / "state"),
            tenants=tenants,
        )

    return start


async def register(control: ControlPlane, seed: int = 0, adapter_id: str = "pirate", **options: object) -> Adapter:
    source = write_adapter(control.roots / f"{adapter_id}-{seed}", seed=seed).name
    return await control.admin.create_adapter(
        adapter_id,
        base_model="tiny",
        source=source,
        wait=MOST_SECONDS,
        **options,  # type: ignore[arg-type]
    )


async def settled(control: ControlPlane) -> Adapter:
    """The one adapter, once it is no longer LOADING."""
    async for message in control.admin.watch_adapters():
        if message.adapter.state not in (Adapter.STATE_UNSPECIFIED, Adapter.STATE_LOADING):
            return message.adapter
    raise AssertionError("a watch does not end")


async def moved(control: ControlPlane, away_from: Adapter) -> Adapter:
    """The version that the name means, once it is another one."""
    async for message in control.admin.watch_adapters():
        if message.adapter.current and message.adapter.version != away_from.version:
            return message.adapter
    raise AssertionError("a watch does not end")


async def test_adapters_versions_and_the_alias_survive(start: Start) -> None:
    async with start() as control:
        old = await register(control, 0, labels={"team": "a"})
        new = await register(control, 1)
        await control.admin.update_adapter("pirate", version=old.version)
    async with start() as control:
        found = {a.version: a for a in await control.admin.list_adapters(include_versions=True)}
        assert set(found) == {old.version, new.version}
        assert (await control.admin.get_adapter("pirate")).version == old.version
        again = found[old.version]
        assert (again.state, again.rank, again.digest) == (Adapter.STATE_ACTIVE, old.rank, old.digest)
        assert dict(again.labels) == {"team": "a"}
        assert again.create_time == old.create_time
        answer = await control.client.generate("pirate", "abc", max_tokens=1)
        assert answer.target.adapter_version == old.version


async def test_an_etag_from_an_earlier_life_still_guards(start: Start) -> None:
    async with start() as control:
        adapter = await register(control)
    async with start() as control:
        assert (await control.admin.get_adapter("pirate")).etag == adapter.etag
        changed = await control.admin.update_adapter("pirate", labels={"x": "y"}, etag=adapter.etag)
        assert int(changed.etag) > int(adapter.etag)


async def test_an_adapter_whose_files_are_gone_is_failed_and_keeps_its_name(start: Start) -> None:
    async with start() as control:
        await register(control)
        shutil.rmtree(control.roots / "pirate-0")
    async with start() as control:
        adapter = await settled(control)
        assert adapter.state == Adapter.STATE_FAILED
        assert "cannot be read" in adapter.error.message
        assert adapter.current


async def test_an_adapter_whose_files_were_changed_is_failed(start: Start) -> None:
    async with start() as control:
        await register(control)
        write_adapter(control.roots / "pirate-0", seed=7, rank=2)
    async with start() as control:
        adapter = await settled(control)
        assert adapter.state == Adapter.STATE_FAILED
        assert "they were changed" in adapter.error.message


async def test_a_failed_adapter_is_tried_again(start: Start) -> None:
    async with start() as control:
        await register(control)
        kept = control.roots / "pirate-0"
        kept.rename(control.roots / "away")
    async with start() as control:
        assert (await settled(control)).state == Adapter.STATE_FAILED
        (control.roots / "away").rename(kept)
    async with start() as control:
        assert (await settled(control)).state == Adapter.STATE_ACTIVE


async def test_an_uploaded_adapter_survives_without_its_origin(start: Start, tmp_path: Path) -> None:
    async with start() as control:
        origin = write_adapter(tmp_path / "elsewhere", seed=3)
        uploaded = await control.admin.upload_adapter("mine", base_model="tiny", directory=origin, wait=MOST_SECONDS)
        assert uploaded.state == Adapter.STATE_ACTIVE
        shutil.rmtree(origin)
    async with start() as control:
        assert (await control.admin.get_adapter("mine")).digest == uploaded.digest
        answer = await control.client.generate("mine", "abc", max_tokens=1)
        assert answer.target.adapter_version == uploaded.version


async def test_what_was_deleted_stays_away(start: Start, tmp_path: Path) -> None:
    async with start() as control:
        origin = write_adapter(tmp_path / "elsewhere", seed=3)
        await control.admin.upload_adapter("mine", base_model="tiny", directory=origin, wait=MOST_SECONDS)
        await control.admin.delete_adapter("mine", wait=MOST_SECONDS)
    async with start() as control:
        assert await control.admin.list_adapters() == []
    assert list((tmp_path / "state" / "adapters" / "versions").iterdir()) == []


async def test_an_alias_that_was_moved_by_hand_is_not_moved_back_by_the_configuration(start: Start) -> None:
    configured = (AdapterConfig(name="pirate", model="tiny", source="pirate-1"),)
    async with start() as control:
        old = await register(control, 0)
        write_adapter(control.roots / "pirate-1", seed=1)
    async with start(configured) as control:
        await moved(control, away_from=old)
        await control.admin.update_adapter("pirate", version=old.version)
    async with start(configured) as control:
        assert (await control.admin.get_adapter("pirate")).version == old.version


async def test_the_adapters_of_a_model_that_is_no_longer_configured_say_so(
    start: Start, byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    async with start() as control:
        source = write_adapter(control.roots / "pirate").name
        await control.admin.create_adapter("pirate", base_model="other", source=source)
    async with control_plane(
        byte_tokenizer_directory, tmp_path / "roots", state_directory=str(tmp_path / "state"), models=("tiny",)
    ) as control:
        adapter = await control.admin.get_adapter("pirate")
        assert adapter.state == Adapter.STATE_FAILED
        assert "is not configured any more" in adapter.error.message
        await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
        assert await control.admin.list_adapters() == []


async def test_what_a_tightened_policy_does_not_accept_is_not_served_and_comes_back_with_the_policy(
    start: Start,
) -> None:
    async with start() as control:
        kept, dropped = await register(control, 0, "kept"), await register(control, 1, "dropped", pinned=True)
    tightened = {"shared": TenantConfig(adapter_digests=(kept.digest,))}
    async with start(tenants=tightened) as control:
        found = await control.admin.get_adapter("dropped")
        assert (found.state, found.error.code) == (Adapter.STATE_FAILED, StatusCode.FAILED_PRECONDITION.value[0])
        assert "accepts only listed or signed adapters" in found.error.message
        with pytest.raises(FailedPrecondition) as raised:
            await control.client.generate("dropped", "abc", max_tokens=1)
        assert raised.value.reason == "ADAPTER_UNTRUSTED"
        answer = await control.client.generate("kept", "abc", max_tokens=1)
        assert answer.target.adapter_version == kept.version
        assert {key.name for key in control.core().loaded} == {"shared/kept"}
    async with start() as control:
        answer = await control.client.generate("dropped", "abc", max_tokens=1)
        assert answer.target.adapter_version == dropped.version


# ---- what is missing or damaged --------------------------------------------------------------------------------------


OTHER_NAMES = "CAST(replace(replace(body, 'pirate', 'others'), 'routes/r', 'routes/o') AS BLOB)"


def change_records(state: Path, change: str) -> None:
    """An SQL expression over `body`, for the records of all resources."""
    with closing(sqlite3.connect(state / FILE_NAME, isolation_level=None)) as connection:
        connection.execute(f"UPDATE resources SET body = {change} WHERE kind IN ('adapter', 'route')")


async def test_a_configured_adapter_that_is_not_there_is_failed_with_where_it_was_looked_for(
    start: Start, tmp_path: Path
) -> None:
    gone = str(tmp_path / "roots" / "gone")
    configured = (AdapterConfig(name="legal", model="tiny", source=gone),)
    async with start(configured) as control:
        [adapter] = await control.admin.list_adapters()
        assert (adapter.name, adapter.state) == ("tenants/shared/adapters/legal", Adapter.STATE_FAILED)
        assert (adapter.version, adapter.digest) == ("", "")
        assert f"{gone} was looked for under {tmp_path / 'roots'}" in adapter.error.message
        with pytest.raises(FailedPrecondition, match="looked for") as raised:
            await control.client.generate("legal", "abc", max_tokens=1)
        assert raised.value.reason == "SOURCE_NOT_ALLOWED"


async def test_a_configured_adapter_that_is_there_at_the_next_start_is_active_and_alone(
    start: Start, tmp_path: Path
) -> None:
    directory = tmp_path / "roots" / "legal"
    configured = (AdapterConfig(name="legal", model="tiny", source=str(directory)),)
    async with start(configured):
        pass
    write_adapter(directory)
    async with start(configured) as control:
        await settled(control)
        [adapter] = await control.admin.list_adapters(include_versions=True)
        assert adapter.state == Adapter.STATE_ACTIVE


async def test_what_is_not_there_goes_when_its_files_are_registered(start: Start, tmp_path: Path) -> None:
    configured = (AdapterConfig(name="pirate", model="tiny", source=str(tmp_path / "roots" / "gone")),)
    async with start(configured) as control:
        adapter = await register(control)
        assert [a.version for a in await control.admin.list_adapters(include_versions=True)] == [adapter.version]


async def test_what_is_not_there_can_be_deleted(start: Start, tmp_path: Path) -> None:
    configured = (AdapterConfig(name="pirate", model="tiny", source=str(tmp_path / "roots" / "gone")),)
    async with start(configured) as control:
        await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
        assert await control.admin.list_adapters() == []


@pytest.mark.parametrize("change", ["x'00ff'", "substr(body, 1, 40)", "'{}'", OTHER_NAMES, "''"])
async def test_a_damaged_record_is_named_and_failed_and_keeps_nothing_else_down(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    async with start() as control:
        await register(control)
        await control.admin.update_route(
            Route(name="tenants/shared/routes/r", targets=[RouteTarget(model="pirate")]), allow_missing=True
        )
    change_records(tmp_path / "state", change)
    async with start() as control:
        adapter = await control.admin.get_adapter("pirate")
        assert adapter.state == Adapter.STATE_FAILED
        for part in (FILE_NAME, "shared/pirate", "damaged"):
            assert part in adapter.error.message
        assert "route tenants/shared/routes/r cannot be brought back" in caplog.text
        await control.client.generate("tiny", "abc", max_tokens=1)
        assert (await register(control)).state == Adapter.STATE_ACTIVE  # which mends it
    async with start() as control:
        assert (await settled(control)).state == Adapter.STATE_ACTIVE


async def test_the_files_of_an_adapter_whose_record_is_damaged_stay(start: Start, tmp_path: Path) -> None:
    async with start() as control:
        files = write_adapter(tmp_path / "files")
        adapter = await control.admin.upload_adapter("pirate", base_model="tiny", directory=files, wait=MOST_SECONDS)
    change_records(tmp_path / "state", "x'00'")
    async with start():
        pass
    kept = tmp_path / "state" / "adapters" / "versions" / adapter.digest.removeprefix("sha256:")
    assert sorted(file.name for file in kept.iterdir()) == sorted(file.name for file in files.iterdir())


async def test_a_state_file_whose_pages_are_damaged_is_refused_by_name(start: Start, tmp_path: Path) -> None:
    async with start() as control:
        for seed in range(8):
            await register(control, seed, labels={"x": "y" * 60})
    file = tmp_path / "state" / FILE_NAME
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    with pytest.raises(OSError, match=FILE_NAME):
        async with start():
            pass


# ---- a disk that is full ---------------------------------------------------------------------------------------------


def refuse(changes: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def route(target: str) -> Route:
    return Route(name="tenants/shared/routes/r", targets=[RouteTarget(model=target)])


Change = Callable[[ControlPlane, list[Adapter]], Awaitable[object]]

CHANGES: dict[str, Change] = {
    "create": lambda control, known: control.admin.create_adapter("new", base_model="tiny", source="pirate-1"),
    "upload": lambda control, known: control.admin.upload_adapter(
        "new", base_model="tiny", directory=write_adapter(control.roots.parent / "up", seed=5)
    ),
    "alias": lambda control, known: control.admin.update_adapter("pirate", version=known[0].version),
    "pin": lambda control, known: control.admin.update_adapter("pirate", pinned=True),
    "labels": lambda control, known: control.admin.update_adapter("pirate", labels={"a": "b"}),
    "delete": lambda control, known: control.admin.delete_adapter("pirate"),
    "change route": lambda control, known: control.admin.update_route(route("tiny")),
    "delete route": lambda control, known: control.admin.delete_route("tenants/shared/routes/r"),
}


async def everything(control: ControlPlane) -> list[object]:
    adapters = await control.admin.list_adapters(include_versions=True)
    return [
        [(a.version, a.state, a.current, a.pinned, dict(a.labels)) for a in adapters],
        await control.admin.list_routes(),
        set(control.core().pinned),
    ]


@pytest.mark.parametrize("kind", CHANGES)
async def test_a_change_that_cannot_be_saved_is_refused_and_not_in_force(
    start: Start, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with start() as control:
        known = [await register(control, 0), await register(control, 1)]
        await control.admin.update_route(route("pirate"), allow_missing=True)
        before = await everything(control)
        with monkeypatch.context() as full:
            full.setattr(control.app.state, "_commit", refuse)
            async with AsyncAdminClient(control.addresses.admin, options={"grpc.enable_retries": 0}) as admin:
                once = dataclasses.replace(control, admin=admin)
                with pytest.raises(Unavailable) as raised:
                    await CHANGES[kind](once, known)
            assert raised.value.reason == "STATE_UNWRITABLE"
            assert await everything(control) == before
        await CHANGES[kind](control, known)
        assert await everything(control) != before
    async with start() as control:
        assert (await control.client.generate("tiny", "abc", max_tokens=1)).usage.completion_tokens == 1


async def test_what_could_not_be_saved_is_not_there_after_a_restart_either(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as control:
        await register(control)
        with monkeypatch.context() as full:
            full.setattr(control.app.state, "_commit", refuse)
            async with AsyncAdminClient(control.addresses.admin, options={"grpc.enable_retries": 0}) as admin:
                with pytest.raises(Unavailable):
                    await admin.update_adapter("pirate", labels={"a": "b"})
    async with start() as control:
        assert dict((await control.admin.get_adapter("pirate")).labels) == {}
