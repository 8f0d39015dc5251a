"""RouteService: names that lead to several targets by weight, stay with a key, fall back, and survive restarts."""

import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from loraplex import Aborted, InvalidArgument, NotFound, PermissionDenied
from loraplex.v1.generation_pb2 import Sampling
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_service.names.routing import choose
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

NAME = "tenants/shared/routes/main"


def route(*targets: tuple[str, int], name: str = NAME, **fields: object) -> Route:
    made = [RouteTarget(model=model, weight=weight) for model, weight in targets]
    return Route(name=name, targets=made, **fields)  # type: ignore[arg-type]


async def put(control: ControlPlane, made: Route, mask: Sequence[str] | None = None) -> Route:
    return await control.admin.update_route(made, update_mask=mask, allow_missing=True)


async def adapter(control: ControlPlane, name: str, seed: int) -> str:
    source = write_adapter(control.roots / f"{name}-{seed}", seed=seed).name
    return (await control.admin.create_adapter(name, base_model="tiny", source=source, wait=MOST_SECONDS)).version


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_keys_are_shared_out_by_weight() -> None:
    chosen = Counter(choose(route(("a", 3), ("b", 1), ("c", 0)), f"user-{number}") for number in range(20_000))
    assert chosen["c"] == 0
    assert 0.735 < chosen["a"] / 20_000 < 0.765  # five standard deviations


def test_one_key_goes_to_one_target() -> None:
    made = route(("a", 1), ("b", 1))
    assert len({choose(made, "user-1") for _ in range(20)}) == 1


def test_a_grown_target_takes_keys_and_no_other_key_moves() -> None:
    before, after = route(("a", 1), ("b", 1), ("c", 1)), route(("a", 1), ("b", 1), ("c", 3))
    keys = [f"user-{number}" for number in range(2000)]
    moved = {(choose(before, key), choose(after, key)) for key in keys if choose(before, key) != choose(after, key)}
    assert moved == {("a", "c"), ("b", "c")}


def test_without_a_key_every_request_is_drawn_anew() -> None:
    assert {choose(route(("a", 1), ("b", 1)), "") for _ in range(200)} == {"a", "b"}


# ---- routing ---------------------------------------------------------------------------------------------------------


async def test_a_request_goes_where_its_route_leads_and_is_told_so(control: ControlPlane) -> None:
    version = await adapter(control, "pirate", 0)
    await put(control, route(("pirate", 1)))
    answer = await control.client.generate("main", "abc", max_tokens=1)
    assert (answer.target.route, answer.target.adapter_version) == (NAME, version)


async def test_a_route_comes_before_an_adapter_of_its_name(control: ControlPlane) -> None:
    old = await adapter(control, "pirate", 0)
    await adapter(control, "pirate", 1)
    await put(control, route((old, 1), name="tenants/shared/routes/pirate"))
    answer = await control.client.generate("pirate", "abc", max_tokens=1)
    assert answer.target.adapter_version == old


async def test_a_key_decides_for_generating_and_for_resolving_alike(control: ControlPlane) -> None:
    await adapter(control, "pirate", 0)
    await put(control, route(("pirate", 1), ("models/tiny", 1)))
    seen = set()
    for number in range(8):
        key = f"user-{number}"
        resolved = await control.admin.resolve_target("main", target_key=key)
        answer = await control.client.generate("main", "abc", max_tokens=1, routing_key=key)
        assert answer.target.adapter_version == resolved.target.adapter_version
        seen.add(answer.target.adapter_version)
    assert len(seen) == 2


async def test_a_target_that_is_gone_falls_back(control: ControlPlane) -> None:
    await adapter(control, "pirate", 0)
    await put(control, route(("pirate", 1), fallback="models/tiny"))
    await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    answer = await control.client.generate("main", "abc", max_tokens=1)
    assert (answer.target.model, answer.target.adapter_version) == ("models/tiny", "")
    await put(control, Route(name=NAME), mask=["fallback"])
    with pytest.raises(NotFound):
        await control.client.generate("main", "abc", max_tokens=1)


async def test_a_route_has_sampling_defaults_of_its_own(control: ControlPlane) -> None:
    await put(control, route(("tiny", 1), default_sampling=Sampling(temperature=0.0)))
    answer = await control.client.generate("main", "abc", max_tokens=1)
    assert not answer.HasField("seed")  # greedy
    answer = await control.client.generate("main", "abc", max_tokens=1, temperature=1.0)
    assert answer.HasField("seed")


async def test_the_targets_of_a_route_are_loaded_ahead(control: ControlPlane) -> None:
    version = await adapter(control, "pirate", 0)
    await control.admin.unload_adapter("pirate", wait=MOST_SECONDS)
    await put(control, route((version, 1)))
    async for message in control.admin.watch_load(interval=0.1):
        assert message
        if (await control.admin.get_adapter("pirate")).residency == 2:
            break


async def test_routes_of_others_are_not_seen(control: ControlPlane) -> None:
    await put(control, route(("tiny", 1), name="tenants/acme/routes/main"))
    with pytest.raises(NotFound):
        await control.client.generate("main", "abc")
    with pytest.raises(PermissionDenied):
        await control.client.generate("tenants/acme/routes/main", "abc")


# ---- changing --------------------------------------------------------------------------------------------------------


async def test_a_route_is_what_it_was_made(control: ControlPlane) -> None:
    made = await put(control, route(("tiny", 2), labels={"a": "b"}))
    assert await control.admin.get_route("main") == made
    assert await control.admin.list_routes() == [made]
    assert await control.admin.list_routes(tenant="acme") == []
    await control.admin.delete_route("main")
    with pytest.raises(NotFound) as raised:
        await control.admin.get_route("main")
    assert raised.value.reason == "ROUTE_NOT_FOUND"


async def test_a_deletion_that_is_sent_again_deletes_once(control: ControlPlane) -> None:
    request_id = str(uuid.uuid4())
    await put(control, route(("models/tiny", 1)))
    await control.admin.delete_route("main", request_id=request_id)
    await put(control, route(("models/tiny", 1)))
    await control.admin.delete_route("main", request_id=request_id)
    assert (await control.admin.get_route("main")).name == NAME


async def test_only_the_fields_of_the_mask_change(control: ControlPlane) -> None:
    made = await put(control, route(("tiny", 2), labels={"a": "b"}))
    changed = await put(control, Route(name=NAME, labels={"c": "d"}, targets=[]), mask=["labels"])
    assert (dict(changed.labels), changed.targets[0].weight) == ({"c": "d"}, 2)
    assert changed.create_time == made.create_time
    assert changed.etag != made.etag


async def test_a_route_that_changed_meanwhile_is_not_overwritten(control: ControlPlane) -> None:
    made = await put(control, route(("tiny", 1)))
    await put(control, route(("tiny", 2)))
    with pytest.raises(Aborted):
        await put(control, route(("tiny", 3), etag=made.etag))
    with pytest.raises(Aborted):
        await control.admin.delete_route("main", etag=made.etag)


async def test_a_missing_route_is_only_made_when_that_is_wanted(control: ControlPlane) -> None:
    with pytest.raises(NotFound):
        await control.admin.update_route(route(("tiny", 1)))


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (route(), "route.targets"),
        (route(("tiny", 0)), "route.targets"),
        (route(("tiny", -1)), "route.targets[0].weight"),
        (route(("tiny", 1), ("tiny", 1)), "route.targets"),
        (route(("nope", 1)), "route.targets[0].model"),
        (route(("tiny", 1), ("tenants/acme/adapters/theirs", 1)), "route.targets[1].model"),
        (route((NAME, 1)), "route.targets[0].model"),
        (route(("tiny", 1), fallback="nope"), "route.fallback"),
        (route(("tiny", 1), default_sampling=Sampling(n=2)), "route.default_sampling.n"),
        (route(("tiny", 1), default_sampling=Sampling(best_of=2)), "route.default_sampling.best_of"),
        (route(("tiny", 1), default_sampling=Sampling(top_p=7)), "route.default_sampling.top_p"),
        (route(("tiny", 1), labels={"": "x"}), "route.labels"),
        (route(("tiny", 1), name="main"), "route.name"),
    ],
)
async def test_a_route_that_leads_nowhere_is_refused(control: ControlPlane, made: Route, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await put(control, made)
    assert field in [violation.field for violation in raised.value.violations]


async def test_a_target_may_be_a_model_that_is_not_loaded(control: ControlPlane) -> None:
    await put(control, route(("other", 1), fallback="tiny"))
    answer = await control.client.generate("main", "abc", max_tokens=1)
    assert answer.target.model == "models/tiny"


async def test_routes_survive_a_restart(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    async with control_plane(byte_tokenizer_directory, tmp_path, state_directory=state) as control:
        made = await put(control, route(("tiny", 2), ("other", 1), fallback="tiny"))
        await put(control, route(("tiny", 1), name="tenants/shared/routes/gone"))
        await control.admin.delete_route("gone")
    async with control_plane(byte_tokenizer_directory, tmp_path, state_directory=state) as control:
        assert await control.admin.list_routes() == [made]
