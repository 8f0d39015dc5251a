"""Two tenants on one server: what is one's own is nobody else's to use, to see, to change or to be billed for."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraplex import AsyncAdminClient, AsyncClient, InvalidArgument, LoraplexError, NotFound, PermissionDenied
from loraplex.operations.base import Upload
from loraplex.v1.adapters_pb2 import Adapter, CreateAdapterRequest, UploadAdapterRequest
from loraplex.v1.models_pb2 import Model
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_adapters.versions import AdapterState
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.control.waiting import wait_until
from loraplex_service.telemetry.config import UsageConfig
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

ACMES = "tenants/acme/adapters/pirate"
OF_TENANTS = {"acme": "pirate", "rival": "poet", "shared": "formal"}  # the adapter that each one has


@dataclass
class House:
    """A server with a tenant acme, a tenant rival and an operator."""

    control: ControlPlane
    tokens: dict[str, str]

    def client(self, who: str) -> AsyncClient:
        return AsyncClient(self.control.addresses.data, token=self.tokens[who])

    def admin(self, who: str) -> AsyncAdminClient:
        return AsyncAdminClient(self.control.addresses.admin, token=self.tokens[who])


@pytest.fixture
async def house(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[House]:
    own = [Role.INFERENCE, Role.ADAPTERS]
    made = {
        "acme": make_key("acme", own, None),
        "rival": make_key("rival", own, None),
        "operator": make_key("operator", [Role.ADMIN], None),
        "guest": make_key("guest", [Role.INFERENCE], None),
    }
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=tuple(key for _, key in made.values())))
    roots = tmp_path / "adapters"
    adapters = tuple(
        AdapterConfig(f"{tenant}/{name}", "tiny", str(write_adapter(roots / name, seed=seed)))
        for seed, (tenant, name) in enumerate(OF_TENANTS.items())
    )
    async with control_plane(
        byte_tokenizer_directory,
        roots,
        adapters=adapters,
        auth=AuthConfig(keys=str(tmp_path / "keys.yaml")),
        usage=UsageConfig(file=str(tmp_path / "usage.jsonl")),
    ) as control:
        registry = control.app.registry
        await wait_until(
            lambda: all(version.state is AdapterState.ACTIVE for version in registry.list_versions(None, None, True)),
            registry.subscribe,
            20.0,
        )
        yield House(control, {name: token for name, (token, _) in made.items()})


def route(name: str, target: str, fallback: str | None = None) -> Route:
    return Route(name=name, targets=[RouteTarget(model=target)], fallback=fallback)


async def error_of(client: AsyncClient, model: str) -> LoraplexError:
    """With which both ways of naming a model fail."""
    with pytest.raises(LoraplexError) as raised:
        await client.generate(model, "abc", max_tokens=1)
    with pytest.raises(type(raised.value)):
        await client.tokenize(model, "abc")
    return raised.value


# ---- weighted sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pirate", "nothing"])
@pytest.mark.parametrize("model", ["{}*0.5", "poet*0.5 + {}*0.5", "formal + {}"])
async def test_a_sum_has_no_part_of_another_tenant_whether_it_exists_or_not(
    house: House, model: str, name: str
) -> None:
    async with house.client("rival") as rival, house.admin("rival") as admin:
        theirs = model.format(f"tenants/acme/adapters/{name}")
        assert isinstance(await error_of(rival, theirs), PermissionDenied)
        with pytest.raises(PermissionDenied):
            await admin.resolve_target(theirs)
        await rival.generate("poet*0.5 + formal*0.5", "abc", max_tokens=1)


async def test_the_bare_id_of_anothers_adapter_is_that_of_nothing(house: House) -> None:
    async with house.client("rival") as rival:
        theirs = await error_of(rival, "pirate*0.5 + formal*0.5")
        nothing = await error_of(rival, "nobody*0.5 + formal*0.5")
    assert isinstance(theirs, NotFound)
    assert str(theirs).replace("pirate", "nobody") == str(nothing)


# ---- routes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "fallback"),
    [(ACMES, None), (f"poet*0.5 + {ACMES}*0.5", None), ("poet", ACMES), ("poet", f"{ACMES}*0.1"), ("pirate", None)],
)
@pytest.mark.parametrize("who", ["rival", "operator"])  # whoever makes it: a route sees what its tenant sees
async def test_a_route_does_not_lead_to_another_tenant(
    house: House, who: str, target: str, fallback: str | None
) -> None:
    async with house.admin(who) as admin:
        with pytest.raises(InvalidArgument):
            await admin.update_route(route("tenants/rival/routes/r", target, fallback), allow_missing=True)
        assert await admin.list_routes(tenant="rival") == []


async def test_a_route_of_another_tenant_is_not_followed_seen_or_changed(house: House) -> None:
    name = "tenants/acme/routes/r"
    async with house.admin("acme") as acme, house.admin("rival") as rival, house.client("rival") as caller:
        made = await acme.update_route(route(name, "pirate"), allow_missing=True)
        assert isinstance(await error_of(caller, name), PermissionDenied)
        assert isinstance(await error_of(caller, "r"), NotFound)
        for attempt in (
            rival.get_route(name),
            rival.delete_route(name),
            rival.update_route(route(name, "poet"), allow_missing=True),
            rival.update_route(route("tenants/shared/routes/r", "formal"), allow_missing=True),
            rival.resolve_target("r", tenant="acme"),
        ):
            with pytest.raises(PermissionDenied):
                await attempt
        with pytest.raises(NotFound):
            await rival.resolve_target("r")
        assert await acme.get_route(name) == made


# ---- watching --------------------------------------------------------------------------------------------------------


async def test_who_watches_sees_changes_of_the_own_tenant_alone(house: House, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "more", seed=9)
    async with house.admin("acme") as acme, house.admin("rival") as rival:
        watch = rival.watch_adapters(tenant="rival")
        seen = [(await anext(watch)).adapter.name for _ in range(2)]  # what there is, and the end of that
        assert seen == ["tenants/rival/adapters/poet", ""]
        await acme.update_adapter("pirate", tenant="acme", labels={"secret": "plan"})
        await acme.upload_adapter("more", base_model="tiny", directory=files, tenant="acme", wait=MOST_SECONDS)
        await acme.delete_adapter("more", tenant="acme", wait=MOST_SECONDS)
        await rival.update_adapter("poet", tenant="rival", labels={"own": "label"})
        change = await anext(watch)
        assert (change.adapter.name, dict(change.adapter.labels)) == ("tenants/rival/adapters/poet", {"own": "label"})
        watch.cancel()
        with pytest.raises(PermissionDenied):
            await anext(rival.watch_adapters(tenant="acme"))


async def test_all_tenants_are_the_own_and_the_shared_one_to_who_is_no_operator(house: House) -> None:
    async with house.admin("rival") as rival, house.admin("acme") as acme, house.admin("operator") as operator:
        await acme.update_route(route("tenants/acme/routes/r", "pirate"), allow_missing=True)
        seen = ["tenants/rival/adapters/poet", "tenants/shared/adapters/formal"]
        assert [adapter.name for adapter in await rival.list_adapters(tenant="-")] == seen
        assert [(await anext(watch)).adapter.name for watch in [rival.watch_adapters(tenant="-")] for _ in seen] == seen
        assert await rival.list_routes(tenant="-") == []
        assert len(await operator.list_adapters(tenant="-")) == 3


# ---- looking ---------------------------------------------------------------------------------------------------------


async def test_who_infers_knows_what_there_is_from_the_data_port(house: House) -> None:
    async with house.client("acme") as acme:
        [model] = [model for model in await acme.list_models() if model.state == Model.STATE_ACTIVE]
        assert (model.name, model.limits.max_context_tokens) == ("models/tiny", 1 << 20)
        assert [adapter.name for adapter in await acme.list_adapters(tenant="acme")] == [ACMES]
        assert (await acme.get_server_info()).version
        assert (await acme.resolve_target("pirate")).target.model == "models/tiny"


@pytest.mark.parametrize(("who", "is_told"), [("operator", True), ("acme", True), ("guest", False)])
async def test_the_admin_port_is_told_to_who_may_use_it(house: House, who: str, is_told: bool) -> None:
    port = int(house.control.addresses.admin.rpartition(":")[2])
    async with house.client(who) as client:
        assert (await client.get_server_info()).admin_port == (port if is_told else 0)


async def test_a_model_tells_tenants_nothing_of_the_server_and_of_its_other_callers(house: House) -> None:
    async with house.client("acme") as acme, house.client("operator") as operator:
        stream = operator.stream_generate("tiny", "abc", max_tokens=100_000)
        while not (await anext(stream)).HasField("delta"):
            pass
        told, whole = await acme.get_model("tiny"), await operator.get_model("tiny")
        stream.cancel()
    assert (told.source, told.memory_bytes, told.running_requests) == ("", 0, 0)
    assert (whole.running_requests, whole.memory_bytes > 0) == (1, True)
    assert whole.source


async def test_a_shared_adapter_tells_tenants_nothing_of_the_server_and_of_its_other_callers(house: House) -> None:
    async with house.client("rival") as rival, house.client("acme") as acme:
        await rival.generate("formal", "abc", max_tokens=1)
        shared, own = await acme.get_adapter("formal"), await acme.get_adapter("pirate", tenant="acme")
    assert (shared.source, shared.HasField("last_use_time")) == ("", False)
    assert own.source


# ---- usage records ---------------------------------------------------------------------------------------------------


async def test_each_tenant_is_billed_for_its_own_and_none_sees_the_bill(house: House) -> None:
    asked = [("acme", "pirate"), ("rival", "formal"), ("acme", "formal*0.5 + pirate*0.5"), ("rival", "tiny")]
    ids = {}
    for who, model in asked:
        async with house.client(who) as client:
            ids[(await client.generate(model, "abc", max_tokens=1)).request_id] = f"tenants/{who}"
            with pytest.raises(PermissionDenied):
                await client.generate(model, "abc", max_tokens=1, metadata={"loraplex-tenant": "operator"})
    async with house.admin("operator") as operator:
        batches = [batch async for batch in operator.watch_usage(existing_only=True)]
    assert {record.id: record.tenant for batch in batches for record in batch.records} == ids
    for who in ("acme", "rival"):
        async with house.admin(who) as admin:
            with pytest.raises(PermissionDenied):
                await anext(admin.watch_usage(after_id=next(iter(ids))))


# ---- uploads ---------------------------------------------------------------------------------------------------------


async def test_nothing_is_uploaded_for_another_tenant(house: House, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "theirs", seed=9)
    headers = [
        UploadAdapterRequest(
            header=CreateAdapterRequest(
                parent=f"tenants/{tenant}", adapter_id="x", adapter=Adapter(base_model="models/tiny")
            )
        )
        for tenant in ("rival", "acme")
    ]
    async with house.admin("rival") as rival, house.admin("operator") as operator:
        for tenant in ("acme", "shared"):
            with pytest.raises(PermissionDenied):
                await rival.upload_adapter("x", base_model="tiny", directory=files, tenant=tenant)
        with pytest.raises(InvalidArgument):  # the first header says whose it is; a second one says nothing
            await rival._upload(Upload("/loraplex.v1.AdapterService/UploadAdapter", iter(headers), Adapter, {}))
        names = [adapter.name for adapter in await operator.list_adapters()]
    assert sorted(names) == sorted(f"tenants/{tenant}/adapters/{name}" for tenant, name in OF_TENANTS.items())


async def test_the_same_files_are_two_adapters_and_deleting_one_leaves_the_other(house: House, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "same", seed=9)
    async with house.admin("acme") as acme, house.admin("rival") as rival, house.client("rival") as caller:
        for admin, tenant in ((acme, "acme"), (rival, "rival")):
            made = await admin.upload_adapter(
                "same", base_model="tiny", directory=files, tenant=tenant, wait=MOST_SECONDS
            )
            assert made.version.startswith(f"tenants/{tenant}/adapters/same@")
        await acme.delete_adapter("same", tenant="acme", wait=MOST_SECONDS)
        await rival.unload_adapter("same", tenant="rival", wait=MOST_SECONDS)  # it is read from its files again
        assert (await caller.generate("same", "abc", max_tokens=1)).target.adapter_version == made.version


async def test_the_request_id_of_another_tenant_gets_nothing_of_its_answer(house: House, tmp_path: Path) -> None:
    files, request_id = write_adapter(tmp_path / "once", seed=9), str(uuid.uuid4())
    async with house.admin("acme") as acme, house.admin("rival") as rival:
        made = await asyncio.gather(
            *(
                admin.upload_adapter(
                    "once",
                    base_model="tiny",
                    directory=files,
                    tenant=tenant,
                    request_id=request_id,
                    wait=MOST_SECONDS,
                )
                for admin, tenant in ((acme, "acme"), (rival, "rival"))
            )
        )
    assert [adapter.name for adapter in made] == ["tenants/acme/adapters/once", "tenants/rival/adapters/once"]


# ---- what is shared --------------------------------------------------------------------------------------------------


async def test_of_a_shared_adapter_a_tenant_sees_neither_others_use_nor_where_it_lies(house: House) -> None:
    async with house.client("acme") as busy, house.admin("rival") as rival, house.admin("operator") as operator:
        stream = busy.stream_generate("formal", "abc", max_tokens=1 << 18)
        await anext(stream)
        seen = await rival.get_adapter("formal")
        assert (seen.state, seen.rank) == (Adapter.STATE_ACTIVE, 4)
        assert (seen.source, seen.residency, seen.running_requests) == ("", 0, 0)
        assert not seen.HasField("last_use_time")
        assert [listed for listed in await rival.list_adapters(tenant="shared")] == [seen]
        everything = await operator.get_adapter("formal")
        assert everything.source.endswith("formal")
        assert everything.running_requests == 1
        stream.cancel()


async def test_who_watches_shared_adapters_is_not_told_when_others_use_them(house: House) -> None:
    async with house.client("acme") as busy, house.admin("rival") as rival, house.admin("operator") as operator:
        watch = rival.watch_adapters(tenant="shared")
        for _ in range(2):
            await anext(watch)
        await busy.generate("formal", "abc", max_tokens=1)  # it moves to the device
        await operator.update_adapter("formal", labels={"a": "label"})
        assert dict((await anext(watch)).adapter.labels) == {"a": "label"}
        watch.cancel()


async def test_why_a_shared_adapter_cannot_be_served_is_its_operators_business(house: House) -> None:
    key = house.control.app.registry.get("tenants/shared/adapters/formal").key
    house.control.app.registry.fail(key, ["/srv/secret/place: gone"])
    async with house.admin("rival") as rival, house.client("rival") as caller, house.admin("operator") as operator:
        seen = await rival.get_adapter("formal")
        assert seen.state == Adapter.STATE_FAILED
        assert "secret" not in seen.error.message
        assert "secret" not in str(await error_of(caller, "formal"))
        assert "secret" in (await operator.get_adapter("formal")).error.message
