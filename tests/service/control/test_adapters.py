"""AdapterService on a running service: adapters come, change, and go while requests run."""

import asyncio
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex import (
    Aborted,
    AlreadyExists,
    AsyncGenerateStream,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from loraplex.v1.adapters_pb2 import (
    ADAPTER_RESIDENCY_DEVICE,
    ADAPTER_RESIDENCY_DISK,
    ADAPTER_RESIDENCY_HOST,
    Adapter,
    AdapterResidency,
)
from loraplex.v1.watch_pb2 import WATCH_EVENT_TYPE_CHANGED, WATCH_EVENT_TYPE_DELETED, WATCH_EVENT_TYPE_SNAPSHOT_END
from loraplex_service.adapters.config import AdapterConfig, ConstraintConfig
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS


async def create(control: ControlPlane, adapter_id: str = "pirate", seed: int = 0, **options: Any) -> Adapter:
    """Register an adapter with content of its own, and wait until it is there."""
    source = write_adapter(control.roots / f"{adapter_id}-{seed}", seed=seed).name
    arguments: dict[str, Any] = {"base_model": "tiny", "source": source, "wait": 20.0}
    return await control.admin.create_adapter(adapter_id, **(arguments | options))


async def running_stream(control: ControlPlane, model: str) -> AsyncGenerateStream:
    """A stream that goes on until it is cancelled, with its first events read."""
    stream = control.client.stream_generate(model, "abc", max_tokens=1 << 19)
    await anext(stream)
    return stream


async def until(condition: Callable[[], bool]) -> None:
    """On the engine, which is in another thread and sends no events of that."""
    async with asyncio.timeout(MOST_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def short(version: str) -> str:
    return version.rpartition("/")[2]


# ---- create ----------------------------------------------------------------------------------------------------------


async def test_a_created_adapter_says_what_it_is(control: ControlPlane) -> None:
    adapter = await create(control, labels={"team": "a"})
    assert adapter.state == Adapter.STATE_ACTIVE
    assert adapter.name == "tenants/shared/adapters/pirate"
    assert adapter.version == f"{adapter.name}@{adapter.digest.removeprefix('sha256:')[:12]}"
    assert adapter.base_model == "models/tiny"
    assert adapter.current
    assert (adapter.rank, adapter.alpha, list(adapter.target_modules)) == (4, 8.0, ["q_proj"])
    assert adapter.residency == ADAPTER_RESIDENCY_HOST
    assert list(adapter.warnings) == ["a warning"]
    assert dict(adapter.labels) == {"team": "a"}


async def test_a_warning_of_its_config_comes_from_the_engine_alone(control: ControlPlane) -> None:
    directory = write_adapter(control.roots / "classifier")
    config = json.loads((directory / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    adapter = await control.admin.create_adapter(
        "classifier", base_model="tiny", source="classifier", wait=MOST_SECONDS
    )
    assert list(adapter.warnings) == ["a warning"]


async def test_a_created_adapter_can_be_used(control: ControlPlane) -> None:
    adapter = await create(control)
    answer = await control.client.generate("pirate", "abc", max_tokens=3)
    assert answer.target.adapter_version == adapter.version
    assert answer.target.model == "models/tiny"


async def test_without_wait_an_adapter_is_returned_while_it_loads(control: ControlPlane) -> None:
    control.core().loads_allowed.clear()
    adapter = await create(control, wait=None)
    assert adapter.state == Adapter.STATE_LOADING
    control.core().loads_allowed.set()
    again = await create(control)
    assert (again.version, again.state) == (adapter.version, Adapter.STATE_ACTIVE)


async def test_a_wait_that_is_over_returns_the_adapter_as_it_is(control: ControlPlane) -> None:
    control.core().loads_allowed.clear()
    adapter = await create(control, wait=0.01)
    assert adapter.state == Adapter.STATE_LOADING


async def test_the_same_files_again_change_nothing(control: ControlPlane) -> None:
    first = await create(control)
    again = await create(control)
    assert (again.version, again.create_time, again.etag) == (first.version, first.create_time, first.etag)
    assert len(control.core().loaded) == 1


async def test_an_adapter_that_does_not_fit_the_model_is_failed_and_says_why(control: ControlPlane) -> None:
    write_adapter(control.roots / "rejected")
    adapter = await create(control, source="rejected")
    assert adapter.state == Adapter.STATE_FAILED
    assert "this model needs [rank, 64]" in adapter.error.message
    with pytest.raises(FailedPrecondition, match="this model needs") as raised:
        await control.client.generate("pirate", "abc")
    assert raised.value.reason == "ADAPTER_INVALID"


async def test_an_adapter_of_too_high_a_rank_is_failed(control: ControlPlane) -> None:
    write_adapter(control.roots / "big", rank=16)
    adapter = await create(control, source="big")
    assert adapter.state == Adapter.STATE_FAILED
    assert adapter.error.message == "rank 16: model 'tiny' takes at most 8 (max_adapter_rank)"
    assert control.core().loaded == []


async def test_files_that_are_no_adapter_are_failed(control: ControlPlane) -> None:
    config = write_adapter(control.roots / "loha") / "adapter_config.json"
    config.write_text('{"peft_type": "LOHA", "r": 4}')
    adapter = await create(control, source="loha")
    assert adapter.state == Adapter.STATE_FAILED
    assert "LOHA" in adapter.error.message


@pytest.mark.parametrize("source", ["../outside", "/etc", "missing", "https://example.org/x"])
async def test_a_source_outside_the_roots_is_refused(control: ControlPlane, source: str) -> None:
    with pytest.raises(PermissionDenied) as raised:
        await create(control, source=source)
    assert raised.value.reason == "SOURCE_NOT_ALLOWED"


async def test_an_empty_directory_is_refused(control: ControlPlane) -> None:
    (control.roots / "empty").mkdir()
    with pytest.raises(FailedPrecondition, match=r"adapter_model\.safetensors is missing") as raised:
        await create(control, source="empty")
    assert raised.value.reason == "ADAPTER_INVALID"


async def test_files_of_another_digest_are_refused(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="the files have another one, sha256:") as raised:
        await create(control, digest="sha256:" + "0" * 64)
    assert raised.value.violations[0].field == "adapter.digest"


async def test_an_adapter_of_a_model_that_nobody_configured_is_refused(control: ControlPlane) -> None:
    with pytest.raises(NotFound, match="there is no model 'nope'"):
        await create(control, base_model="nope")


async def test_the_same_version_for_another_model_is_refused(control: ControlPlane) -> None:
    await create(control)
    with pytest.raises(AlreadyExists, match="registered for model 'tiny'"):
        await create(control, base_model="other")


async def test_every_field_at_fault_is_named(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await create(control, "Not An Id", source="", digest="md5:1", labels={"": "x"})
    fields = {violation.field for violation in raised.value.violations}
    assert {"adapter_id", "adapter.source", "adapter.digest", "adapter.labels"} <= fields


async def test_validate_only_registers_nothing(control: ControlPlane) -> None:
    adapter = await create(control, validate_only=True)
    assert adapter.rank == 4
    assert await control.admin.list_adapters() == []


async def test_validate_only_finds_what_the_model_cannot_take(control: ControlPlane) -> None:
    write_adapter(control.roots / "rejected")
    with pytest.raises(FailedPrecondition, match="this model needs"):
        await create(control, source="rejected", validate_only=True)
    write_adapter(control.roots / "big", rank=16)
    with pytest.raises(FailedPrecondition) as raised:
        await create(control, source="big", validate_only=True)
    assert raised.value.reason == "ADAPTER_RANK_TOO_HIGH"


async def test_the_same_request_id_gets_the_first_result(control: ControlPlane) -> None:
    request_id = str(uuid.uuid4())
    first = await create(control, request_id=request_id)
    again = await create(control, seed=1, request_id=request_id)
    assert again == first


async def test_an_adapter_of_an_unloaded_model_waits_for_it(control: ControlPlane) -> None:
    adapter = await create(control, base_model="other", wait=None)
    assert adapter.state == Adapter.STATE_LOADING
    watch = control.admin.watch_adapters()
    await control.admin.load_model("other", wait=MOST_SECONDS)
    async for message in watch:
        if message.adapter.state == Adapter.STATE_ACTIVE:
            break
    assert (await control.client.generate("pirate", "ab", max_tokens=2)).target.model == "models/other"


# ---- look ------------------------------------------------------------------------------------------------------------


async def test_adapters_are_listed_by_tenant_and_model(control: ControlPlane) -> None:
    await create(control, "one")
    await create(control, "two", tenant="acme")
    await create(control, "three", base_model="other", wait=None)

    async def listed(**options: Any) -> list[str]:
        return [adapter.name for adapter in await control.admin.list_adapters(**options)]

    assert len(await listed()) == 3
    assert await listed(tenant="acme") == ["tenants/acme/adapters/two"]
    assert await listed(base_model="other") == ["tenants/shared/adapters/three"]


async def test_only_current_versions_are_listed_unless_all_are_asked_for(control: ControlPlane) -> None:
    first, second = await create(control), await create(control, seed=1)
    assert [adapter.version for adapter in await control.admin.list_adapters()] == [second.version]
    every = await control.admin.list_adapters(include_versions=True)
    assert {adapter.version for adapter in every} == {first.version, second.version}


async def test_one_version_can_be_asked_for(control: ControlPlane) -> None:
    first, _ = await create(control), await create(control, seed=1)
    found = await control.admin.get_adapter(short(first.version))
    assert (found.version, found.current) == (first.version, False)


async def test_an_adapter_that_is_not_there_is_not_found(control: ControlPlane) -> None:
    with pytest.raises(NotFound, match="there is no adapter") as raised:
        await control.admin.get_adapter("nope")
    assert raised.value.reason == "ADAPTER_NOT_FOUND"


async def test_a_running_request_shows(control: ControlPlane) -> None:
    await create(control)
    stream = await running_stream(control, "pirate")
    adapter = await control.admin.get_adapter("pirate")
    assert adapter.running_requests == 1
    assert adapter.residency == ADAPTER_RESIDENCY_DEVICE
    assert adapter.HasField("last_use_time")
    stream.cancel()


def in_flight(control: ControlPlane) -> int:
    return control.app.registry.get("tenants/shared/adapters/pirate").num_requests


async def test_a_request_waits_until_its_first_token(control: ControlPlane) -> None:
    await create(control)
    await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)
    control.core().loads_allowed.clear()

    async def counts() -> tuple[int, int]:
        adapter = await control.admin.get_adapter("pirate")
        return adapter.waiting_requests, adapter.running_requests

    started = asyncio.create_task(running_stream(control, "pirate"))
    await until(lambda: in_flight(control) == 1)
    assert await counts() == (1, 0)
    control.core().loads_allowed.set()
    stream = await started
    assert await counts() == (0, 1)
    stream.cancel()
    await until(lambda: in_flight(control) == 0)
    assert await counts() == (0, 0)


async def test_a_request_that_ends_before_its_first_token_waits_no_more(control: ControlPlane) -> None:
    await create(control)
    await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)
    control.core().loads_allowed.clear()
    waiting = asyncio.create_task(control.client.generate("pirate", "abc", max_tokens=5))
    await until(lambda: in_flight(control) == 1)
    waiting.cancel()
    await until(lambda: in_flight(control) == 0)
    assert (await control.admin.get_adapter("pirate")).waiting_requests == 0


# ---- swap ------------------------------------------------------------------------------------------------------------


async def test_new_content_takes_the_name_over_once_it_can_be_used(control: ControlPlane) -> None:
    first = await create(control)
    control.core().loads_allowed.clear()
    second = await create(control, seed=1, wait=None)
    answer = await control.client.generate("pirate", "ab", max_tokens=2)
    assert answer.target.adapter_version == first.version
    control.core().loads_allowed.set()
    await create(control, seed=1)
    answer = await control.client.generate("pirate", "ab", max_tokens=2)
    assert answer.target.adapter_version == second.version


async def test_a_running_request_keeps_its_version_through_a_swap(control: ControlPlane) -> None:
    first = await create(control)
    stream = control.client.stream_generate("pirate", "abc", max_tokens=400)
    await anext(stream)
    await create(control, seed=1)
    answer = await stream.collect()
    assert answer.target.adapter_version == first.version
    assert answer.usage.completion_tokens == 400


async def test_the_old_version_leaves_the_engine_once_nobody_uses_it(control: ControlPlane) -> None:
    first = await create(control)
    stream = await running_stream(control, "pirate")
    await create(control, seed=1)
    old = next(key for key in control.core().adapters if key.digest in first.digest)
    stream.cancel()
    await until(lambda: old not in control.core().adapters)
    found = await control.admin.get_adapter(short(first.version))
    assert (found.state, found.residency) == (Adapter.STATE_ACTIVE, ADAPTER_RESIDENCY_DISK)


async def test_the_old_version_can_still_be_asked_for(control: ControlPlane) -> None:
    first = await create(control)
    await create(control, seed=1)
    answer = await control.client.generate(first.version, "ab", max_tokens=2)
    assert answer.target.adapter_version == first.version


async def test_a_broken_new_version_leaves_the_name_where_it_is(control: ControlPlane) -> None:
    first = await create(control)
    write_adapter(control.roots / "rejected", seed=1)
    broken = await create(control, source="rejected")
    assert broken.state == Adapter.STATE_FAILED
    assert (await control.client.generate("pirate", "ab", max_tokens=2)).target.adapter_version == first.version


async def test_the_name_stays_where_it_is_when_asked_to(control: ControlPlane) -> None:
    first, second = await create(control), await create(control, seed=1, make_current=False)
    assert not second.current
    assert (await control.admin.get_adapter("pirate")).version == first.version


async def test_the_name_can_be_moved_back(control: ControlPlane) -> None:
    first = await create(control)
    await create(control, seed=1)
    moved = await control.admin.update_adapter("pirate", version=short(first.version))
    assert (moved.version, moved.current) == (first.version, True)
    assert (await control.client.generate("pirate", "ab", max_tokens=2)).target.adapter_version == first.version


# ---- change ----------------------------------------------------------------------------------------------------------


async def test_labels_change(control: ControlPlane) -> None:
    created = await create(control, labels={"a": "1"})
    changed = await control.admin.update_adapter("pirate", labels={"b": "2"}, etag=created.etag)
    assert dict(changed.labels) == {"b": "2"}
    assert changed.etag != created.etag


async def test_a_change_of_what_somebody_else_has_changed_is_refused(control: ControlPlane) -> None:
    created = await create(control)
    await control.admin.update_adapter("pirate", labels={"b": "2"})
    with pytest.raises(Aborted, match="has changed since it was read") as raised:
        await control.admin.update_adapter("pirate", labels={"c": "3"}, etag=created.etag)
    assert raised.value.reason == "ETAG_MISMATCH"


async def test_a_version_of_another_adapter_is_refused(control: ControlPlane) -> None:
    await create(control)
    other = await create(control, "poet", seed=2)
    with pytest.raises(InvalidArgument, match="is no version of tenants/shared/adapters/pirate"):
        await control.admin.update_adapter("pirate", version=short(other.version))


# ---- delete ----------------------------------------------------------------------------------------------------------


async def test_a_deleted_adapter_is_gone(control: ControlPlane) -> None:
    await create(control)
    deleted = await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    assert deleted.state == Adapter.STATE_DELETING
    with pytest.raises(NotFound):
        await control.admin.get_adapter("pirate")
    with pytest.raises(NotFound):
        await control.client.generate("pirate", "ab")
    assert control.core().adapters == set()


async def test_running_requests_end_in_peace_before_their_adapter_goes(control: ControlPlane) -> None:
    await create(control)
    stream = control.client.stream_generate("pirate", "abc", max_tokens=400)
    await anext(stream)
    watch = control.admin.watch_adapters()
    deleted = await control.admin.delete_adapter("pirate")
    assert deleted.state == Adapter.STATE_DELETING
    with pytest.raises(NotFound):
        await control.client.generate("pirate", "ab")
    assert (await stream.collect()).usage.completion_tokens == 400
    async for message in watch:
        if message.type == WATCH_EVENT_TYPE_DELETED:
            break
    assert control.core().adapters == set()


async def test_a_deletion_whose_adapter_goes_while_it_is_saved_says_that_there_is_none(
    control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(control)
    stream = control.client.stream_generate("pirate", "abc", max_tokens=400)
    await anext(stream)
    watch = control.admin.watch_adapters()
    await control.admin.delete_adapter("pirate")  # which waits for the stream
    save = control.app.state.save

    async def save_while_it_goes(kind: str, name: str, body: bytes | None) -> None:
        await save(kind, name, body)
        await stream.collect()
        async for message in watch:
            if message.type == WATCH_EVENT_TYPE_DELETED:
                break

    monkeypatch.setattr(control.app.state, "save", save_while_it_goes)
    with pytest.raises(NotFound, match="there is no adapter"):
        await control.admin.delete_adapter("pirate")
    await control.app.state.saved()
    assert control.app.state.read("adapter") == {}


async def test_the_current_version_cannot_go_while_there_are_others(control: ControlPlane) -> None:
    first, second = await create(control), await create(control, seed=1)
    with pytest.raises(FailedPrecondition, match="move the alias") as raised:
        await control.admin.delete_adapter(short(second.version))
    assert raised.value.reason == "ADAPTER_IS_CURRENT"
    await control.admin.delete_adapter(short(first.version), wait=MOST_SECONDS)
    assert len(await control.admin.list_adapters(include_versions=True)) == 1


async def test_a_deleted_adapter_can_be_created_again(control: ControlPlane) -> None:
    await create(control)
    await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    assert (await create(control)).state == Adapter.STATE_ACTIVE


# ---- residency -------------------------------------------------------------------------------------------------------


async def test_an_unloaded_adapter_is_loaded_by_its_next_request(control: ControlPlane) -> None:
    await create(control)
    unloaded = await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)
    assert unloaded.residency == ADAPTER_RESIDENCY_DISK
    assert (await control.client.generate("pirate", "ab", max_tokens=2)).usage.completion_tokens == 2
    assert (await control.admin.get_adapter("pirate")).residency == ADAPTER_RESIDENCY_DEVICE  # the request used it


async def test_an_adapter_is_loaded_ahead_of_its_requests(control: ControlPlane) -> None:
    await create(control)
    await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)
    loaded = await control.admin.load_adapter("pirate", residency="host", wait=MOST_SECONDS)
    assert loaded.residency == ADAPTER_RESIDENCY_HOST


async def test_an_adapter_is_brought_to_the_device_and_away_from_it(control: ControlPlane) -> None:
    await create(control)
    assert (await control.admin.load_adapter("pirate", wait=MOST_SECONDS)).residency == ADAPTER_RESIDENCY_DEVICE
    await control.admin.unload_adapter("pirate", residency="host")
    await residency_is(control, "pirate", ADAPTER_RESIDENCY_HOST)


async def test_an_adapter_can_be_created_on_the_device(control: ControlPlane) -> None:
    adapter = await create(control, residency="device")
    assert adapter.residency == ADAPTER_RESIDENCY_DEVICE


@pytest.mark.parametrize(("method", "residency"), [("load_adapter", "disk"), ("unload_adapter", "device")])
async def test_an_adapter_cannot_be_moved_the_wrong_way(control: ControlPlane, method: str, residency: str) -> None:
    await create(control)
    with pytest.raises(InvalidArgument, match="residency: must be"):
        await getattr(control.admin, method)("pirate", residency=residency)


# ---- pins ------------------------------------------------------------------------------------------------------------


async def residency_is(control: ControlPlane, name: str, residency: int) -> None:
    async with asyncio.timeout(MOST_SECONDS):
        while (await control.admin.get_adapter(name)).residency != residency:  # noqa: ASYNC110 - it is told in no event
            await asyncio.sleep(0.001)


async def test_a_pinned_adapter_is_on_the_device_and_cannot_be_unloaded(control: ControlPlane) -> None:
    await create(control)
    pinned = await control.admin.update_adapter("pirate", pinned=True)
    assert pinned.pinned
    await residency_is(control, "pirate", ADAPTER_RESIDENCY_DEVICE)
    with pytest.raises(FailedPrecondition, match="unpin it first") as raised:
        await control.admin.unload_adapter("pirate")
    assert raised.value.reason == "ADAPTER_PINNED"
    assert not (await control.admin.update_adapter("pirate", pinned=False)).pinned
    assert control.core().pinned == set()
    assert (await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)).residency == ADAPTER_RESIDENCY_DISK


async def test_more_pins_than_there_is_room_for_are_refused(control: ControlPlane) -> None:
    control.core().max_pins = 1
    assert (await create(control, "first", 1, pinned=True)).pinned
    await create(control, "second", 2)
    with pytest.raises(FailedPrecondition, match="unpin others") as raised:
        await control.admin.update_adapter("second", pinned=True)
    assert raised.value.reason == "ADAPTER_PIN_LIMIT"
    assert not (await control.admin.get_adapter("second")).pinned


async def test_pins_hold_over_the_lives_of_an_engine(control: ControlPlane) -> None:
    adapter = await create(control, pinned=True)
    await until(lambda: len(control.core().pinned) == 1)
    before = control.core()
    control.engines["tiny"].started[-1].kill()
    await until(lambda: control.core() is not before and len(control.core().pinned) == 1)
    assert (await control.admin.get_adapter("pirate")).version == adapter.version


# ---- engines that end ------------------------------------------------------------------------------------------------


async def test_an_engine_that_starts_again_gets_its_adapters_back(control: ControlPlane) -> None:
    """Before any request asks for them."""
    adapter = await create(control)
    control.engines["tiny"].started[0].kill()
    await until(lambda: len(control.engines["tiny"].started) == 2 and bool(control.core().adapters))
    assert [key.digest for key in control.core().loaded] == [adapter.digest.removeprefix("sha256:")]
    answer = await control.client.generate("pirate", "ab", max_tokens=2)
    assert answer.target.adapter_version == adapter.version


# ---- watch -----------------------------------------------------------------------------------------------------------


async def test_a_watch_tells_of_every_adapter_that_comes_and_goes(control: ControlPlane) -> None:
    stream = control.admin.watch_adapters()
    assert (await anext(stream)).type == WATCH_EVENT_TYPE_SNAPSHOT_END
    await create(control)
    async for message in stream:
        assert message.type == WATCH_EVENT_TYPE_CHANGED
        if message.adapter.state == Adapter.STATE_ACTIVE and message.adapter.current:
            break


async def test_a_watch_tells_of_every_tier_that_an_adapter_gets_to(control: ControlPlane) -> None:
    await create(control)
    stream = control.admin.watch_adapters()
    while (await anext(stream)).type != WATCH_EVENT_TYPE_SNAPSHOT_END:
        pass

    async def told() -> AdapterResidency.ValueType:
        async with asyncio.timeout(MOST_SECONDS):
            message = await anext(stream)
        assert message.type == WATCH_EVENT_TYPE_CHANGED
        return message.adapter.residency

    await control.admin.load_adapter("pirate", wait=MOST_SECONDS)
    assert await told() == ADAPTER_RESIDENCY_DEVICE
    await control.admin.unload_adapter("pirate", residency="host", wait=MOST_SECONDS)
    assert await told() == ADAPTER_RESIDENCY_HOST
    await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)
    assert await told() == ADAPTER_RESIDENCY_DISK
    await control.admin.load_adapter("pirate", residency="host", wait=MOST_SECONDS)
    assert await told() == ADAPTER_RESIDENCY_HOST
    await control.admin.unload_model("tiny", wait=MOST_SECONDS)
    assert await told() == ADAPTER_RESIDENCY_DISK


async def test_a_move_between_tiers_is_not_saved(control: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    await create(control)
    saved: list[object] = []
    monkeypatch.setattr(control.app.state, "put", lambda *change: saved.append(change))
    loaded = await control.admin.load_adapter("pirate", wait=MOST_SECONDS)
    assert (loaded.residency, saved) == (ADAPTER_RESIDENCY_DEVICE, [])


# ---- configuration ---------------------------------------------------------------------------------------------------


async def test_adapters_of_the_configuration_are_there_from_the_start(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    good = write_adapter(tmp_path / "good")
    configured = (
        AdapterConfig(
            name="good", model="tiny", source=str(good), default_constraint=ConstraintConfig(choices=("yea", "nay"))
        ),
        AdapterConfig(name="acme/own", model="tiny", source=str(write_adapter(tmp_path / "own", seed=1))),
        AdapterConfig(name="gone", model="tiny", source=str(tmp_path / "gone")),
    )
    async with control_plane(byte_tokenizer_directory, tmp_path, adapters=configured) as control:
        found = {adapter.name: adapter.state for adapter in await control.admin.list_adapters()}
        gone = found.pop("tenants/shared/adapters/gone")
        assert set(found) == {"tenants/acme/adapters/own", "tenants/shared/adapters/good"}
        assert gone == Adapter.STATE_FAILED
        assert (await control.admin.get_adapter("good")).default_constraint.choices.values == ["yea", "nay"]
        assert (await control.client.generate("good", "ab", max_tokens=2)).usage.completion_tokens == 2
