"""What tenants may use, and that they see nothing of each other."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import QuotaFailure, RetryInfo
from hypothesis import given
from hypothesis import strategies as st

from loraplex import ResourceExhausted
from loraplex.v1.inference_pb2 import BatchGenerateRequest
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_service.admission.tenants import Tenant, TenantConfig, Tenants, TokenBucket
from loraplex_service.errors import QuotaExceeded
from loraplex_service.text import Tokenizer
from tests.service.control_plane import control_plane, write_adapter
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec
from tests.waits import MOST_SECONDS


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_a_burst_and_then_its_rate(clock: FakeClock) -> None:
    bucket = TokenBucket(2.0, 5.0, clock)
    assert [bucket.take(1) for _ in range(11)] == [0.0] * 10 + [0.5]
    clock.now += 0.5
    assert bucket.take(1) == 0.0
    assert bucket.take(1) == 0.5


def test_what_is_larger_than_a_burst_is_let_in_when_the_bucket_is_full_and_paid_for_afterwards(
    clock: FakeClock,
) -> None:
    bucket = TokenBucket(10.0, 1.0, clock)
    assert bucket.take(30) == 0.0
    assert bucket.take(1) == pytest.approx(2.1)


def test_a_refusal_costs_nothing(clock: FakeClock) -> None:
    bucket = TokenBucket(1.0, 2.0, clock)
    bucket.take(2)
    assert [bucket.take(1) for _ in range(3)] == [1.0] * 3


@given(amounts=st.lists(st.integers(1, 50), max_size=50), gaps=st.lists(st.floats(0, 3), max_size=50))
def test_no_more_is_given_than_the_rate_and_one_burst(amounts: list[int], gaps: list[float]) -> None:
    clock = FakeClock()
    bucket = TokenBucket(5.0, 4.0, clock)
    given_out = 0.0
    for amount, gap in zip(amounts, gaps, strict=False):
        clock.now += gap
        given_out += amount if bucket.take(amount) == 0 else 0
        assert given_out <= 20 + 5 * clock.now + 50  # the last one may be larger than the bucket


def tenant(clock: FakeClock, **config: object) -> Tenant:
    return Tenant("acme", TenantConfig(**config), b"key", clock)  # type: ignore[arg-type]


def test_tokens_that_were_not_used_are_given_back(clock: FakeClock) -> None:
    acme = tenant(clock, tokens_per_second=10.0, burst_seconds=10.0)
    for _ in range(5):
        with acme.spending(100, used_tokens=lambda: 0):
            pass
    with acme.spending(100, used_tokens=lambda: 100), pytest.raises(QuotaExceeded), acme.spending(1, lambda: 0):
        pass


def test_tenants_of_old_are_forgotten_and_those_of_the_configuration_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_service.admission.tenants.REMEMBERED_TENANTS", 3)
    tenants = Tenants({"acme": TenantConfig(weight=2.0)})
    acme = tenants.get("acme")
    for number in range(10):
        tenants.get(f"t{number}")
    assert len(tenants._others) == 3
    assert tenants.get("acme") is acme


# ---- prefixes --------------------------------------------------------------------------------------------------------


def test_cached_prefixes_are_named_by_tenant_and_salt_and_by_a_secret_of_the_server() -> None:
    names = [
        tenants.get(name).cache_salt(salt)
        for tenants in (Tenants(), Tenants())
        for name in ("a", "b", "aa")
        for salt in ("", "a", "b")
    ]
    assert len(set(names)) == len(names)


def test_tenants_of_one_group_share_prefixes_and_nobody_else_does() -> None:
    group = TenantConfig(cache_group="family")
    tenants = Tenants({"a": group, "b": group, "c": TenantConfig(cache_group="other")})
    assert tenants.get("a").cache_salt("s") == tenants.get("b").cache_salt("s")
    assert len({tenants.get(name).cache_salt("s") for name in ("a", "c", "family", "d")}) == 4


# ---- requests --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def plane_of(tokenizer: Tokenizer, clock: FakeClock, **config: object) -> AsyncIterator[DataPlane]:
    """One tenant, acme, is limited."""
    tenants = Tenants({"acme": TenantConfig(**config)}, clock=clock)  # type: ignore[arg-type]
    async with data_plane(tokenizer, tenants=tenants) as plane:
        yield plane


ACME = (("loraplex-tenant", "acme"),)


async def test_the_slowest_rate_that_may_be_has_callers_ask_once_a_day(
    byte_tokenizer: Tokenizer, clock: FakeClock
) -> None:
    async with plane_of(byte_tokenizer, clock, requests_per_second=1e-6) as plane:
        await plane.generate(make_spec(), metadata=ACME)
        failed = await failure(plane.generate(make_spec(), metadata=ACME))
        assert failed.detail(RetryInfo()).retry_delay.ToSeconds() == 86_400


async def test_too_many_requests_are_refused_and_told_when_to_come_again(
    byte_tokenizer: Tokenizer, clock: FakeClock
) -> None:
    async with plane_of(byte_tokenizer, clock, requests_per_second=0.5, burst_seconds=4.0) as plane:
        for _ in range(2):
            await plane.generate(make_spec(), metadata=ACME)
        failed = await failure(plane.generate(make_spec(), metadata=ACME))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA")
        assert failed.detail(QuotaFailure()).violations[0].subject == "tenants/acme: requests per second"
        assert failed.detail(RetryInfo()).retry_delay.ToMilliseconds() == 2000
        await plane.generate(make_spec())  # another tenant
        clock.now += 2.0
        await plane.generate(make_spec(), metadata=ACME)


async def test_the_quota_comes_before_everything_else(byte_tokenizer: Tokenizer, clock: FakeClock) -> None:
    async with plane_of(byte_tokenizer, clock, requests_per_second=0.1) as plane:
        await failure(plane.generate(make_spec(model="nothing"), metadata=ACME))
        failed = await failure(plane.generate(make_spec(sampling={"top_p": 7}), metadata=ACME))
        assert failed.reason == "TENANT_QUOTA"


async def test_every_item_of_a_batch_is_a_request(byte_tokenizer: Tokenizer, clock: FakeClock) -> None:
    async with plane_of(byte_tokenizer, clock, requests_per_second=1.0, burst_seconds=3.0) as plane:
        call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=[make_spec()] * 5), metadata=ACME)
        items = Counter([item.WhichOneof("result") async for item in call])
    assert items == {"error": 2, "response": 3, "started": 1}


async def test_tokens_count_as_they_were_used(byte_tokenizer: Tokenizer, clock: FakeClock) -> None:
    async with plane_of(byte_tokenizer, clock, tokens_per_second=1.0, burst_seconds=20.0) as plane:
        for _ in range(2):  # 3 + 5 tokens each
            await plane.generate(make_spec(stopping={"max_tokens": 5}), metadata=ACME)
        failed = await failure(plane.generate(make_spec(), metadata=ACME))
        assert failed.detail(QuotaFailure()).violations[0].subject == "tenants/acme: tokens per second"
        assert failed.detail(RetryInfo()).retry_delay.ToMilliseconds() == 4000


async def test_a_stream_that_is_left_early_pays_for_what_it_got(byte_tokenizer: Tokenizer, clock: FakeClock) -> None:
    async with plane_of(byte_tokenizer, clock, tokens_per_second=1.0, burst_seconds=100.0) as plane:
        plane.engine.steps_allowed = 0
        running = asyncio.ensure_future(plane.generate(make_spec(stopping={"max_tokens": 97}), metadata=ACME))
        await plane.engine.until(lambda: bool(plane.engine.sequences))
        assert (await failure(plane.generate(make_spec(), metadata=ACME))).reason == "TENANT_QUOTA"
        running.cancel()
        await plane.engine.until_idle()
        plane.engine.allow_steps(100)
        await plane.generate(make_spec(stopping={"max_tokens": 90}), metadata=ACME)


async def test_weight_and_priority_go_to_the_engine_within_what_the_tenant_may_have(
    byte_tokenizer: Tokenizer, clock: FakeClock
) -> None:
    async with plane_of(byte_tokenizer, clock, weight=2.5, max_priority=10) as plane:
        for priority in (100, 10, -7):
            await plane.generate(make_spec(priority=priority), metadata=ACME)
        await plane.generate(make_spec(priority=100))
        sent = [(request.tenant, request.weight, request.priority) for request in plane.engine.requests]
    assert sent == [("acme", 2.5, -10), ("acme", 2.5, -10), ("acme", 2.5, 7), ("default", 1.0, 0)]


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_adapters": 2}, {"max_adapter_bytes": 800}])
async def test_a_tenant_has_no_more_adapters_than_it_may(
    byte_tokenizer_directory: Path, tmp_path: Path, limit: dict[str, int]
) -> None:
    for number in range(3):
        write_adapter(tmp_path / f"a{number}", seed=number)
    tenants = {"acme": TenantConfig(**limit)}  # type: ignore[arg-type]
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:

        async def create(number: int, tenant: str = "acme") -> None:
            await control.admin.create_adapter(
                f"a{number}", base_model="tiny", source=f"a{number}", tenant=tenant, wait=MOST_SECONDS
            )

        await create(0)
        await create(1)
        with pytest.raises(ResourceExhausted) as raised:
            await create(2)
        assert raised.value.reason == "TENANT_QUOTA"
        await create(1)  # it is there already
        await create(2, tenant="other")
        await control.admin.delete_adapter("a0", tenant="acme", wait=MOST_SECONDS)
        await create(2)


async def test_the_same_files_under_several_names_are_as_many_versions(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "same")
    tenants = {"acme": TenantConfig(max_adapters=2)}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:

        async def create(name: str) -> None:
            await control.admin.create_adapter(name, base_model="tiny", source="same", tenant="acme", wait=MOST_SECONDS)

        await create("a")
        await create("b")
        await create("b")  # it is there already
        with pytest.raises(ResourceExhausted, match="3 adapter versions"):
            await create("c")


async def test_a_tenant_has_no_more_routes_than_it_may(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    tenants = {"acme": TenantConfig(max_routes=2)}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        for name in ("a", "b", "a"):
            await control.admin.update_route(route_of(name), allow_missing=True)
        with pytest.raises(ResourceExhausted, match="3 routes"):
            await control.admin.update_route(route_of("c"), allow_missing=True)
        await control.admin.delete_route("a", tenant="acme")
        await control.admin.update_route(route_of("c"), allow_missing=True)


async def test_what_the_server_keeps_for_a_tenant_is_limited(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    tenants = {"acme": TenantConfig(max_state_bytes=4000)}
    labels = {str(number): "x" * 250 for number in range(16)}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        with pytest.raises(ResourceExhausted, match="bytes of routes and adapter records"):
            await control.admin.update_route(route_of("a", **labels), allow_missing=True)
        await control.admin.create_adapter("a", base_model="tiny", source="a", tenant="acme", wait=MOST_SECONDS)
        with pytest.raises(ResourceExhausted):
            await control.admin.update_adapter("a", labels=labels, tenant="acme")
        await control.admin.update_adapter("a", labels={"small": "enough"}, tenant="acme")


def route_of(name: str, **labels: str) -> Route:
    return Route(name=f"tenants/acme/routes/{name}", targets=[RouteTarget(model="tiny")], labels=labels)


async def test_calls_of_the_admin_port_count_as_requests(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    tenants = {"default": TenantConfig(requests_per_second=0.001, burst_seconds=2000.0)}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        await control.admin.list_routes()
        await control.admin.update_route(route_of("a"), allow_missing=True)
        with pytest.raises(ResourceExhausted, match="requests per second"):
            await control.admin.list_routes()
