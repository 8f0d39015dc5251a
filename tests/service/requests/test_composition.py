"""Weighted sums of adapters as a request's model."""

import asyncio

import pytest
from grpc import StatusCode as Code

from loraplex_adapters.key import compose
from tests.service.data_plane import DataPlane, failure, make_spec


async def test_a_weighted_sum_loads_and_applies_all_of_its_adapters(plane: DataPlane) -> None:
    pirate, poet = plane.add_adapter("default/pirate", "ab" * 32), plane.add_adapter("shared/poet", "cd" * 32)
    response = await plane.generate(make_spec(model="pirate*0.7 + tenants/shared/adapters/poet@cdcdcdcdcdcd*-1.5"))
    assert set(plane.engine.adapters) == {pirate.key, poet.key}
    assert plane.engine.requests[0].adapter == compose([(poet.key, -1.5), (pirate.key, 0.7)])
    assert response.target.adapter_version == f"{pirate.version_name}*0.7 + {poet.version_name}*-1.5"


async def test_one_adapter_can_be_scaled_and_a_weight_left_out_is_one(plane: DataPlane) -> None:
    pirate, poet = plane.add_adapter("default/pirate", "ab" * 32), plane.add_adapter("default/poet", "cd" * 32)
    await plane.generate(make_spec(model="pirate*.5"))
    await plane.generate(make_spec(model="pirate+poet"))
    keys = [request.adapter for request in plane.engine.requests]
    assert keys == [compose([(pirate.key, 0.5)]), compose([(pirate.key, 1.0), (poet.key, 1.0)])]


@pytest.mark.parametrize(
    "model",
    [
        "pirate*",
        "*0.5",
        "pirate*0.5+",
        "pirate*x",
        "pirate*nan",
        "pirate*1e3",
        "pirate*16.5",
        "pirate*-17",
        "pirate*0.5*2",
        "pirate*0.5 + pirate*0.5",
        "pirate*0.5 + models/demo*0.5",
        "demo*0.5",
        " + ".join(f"a{index}" for index in range(9)),
    ],
)
async def test_what_is_no_weighted_sum_of_adapters_is_refused(plane: DataPlane, model: str) -> None:
    plane.add_adapter("default/pirate")
    failed = await failure(plane.generate(make_spec(model=model)))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["spec.model"])


async def test_a_member_that_does_not_exist_is_named(plane: DataPlane) -> None:
    plane.add_adapter("default/pirate")
    failed = await failure(plane.generate(make_spec(model="pirate*0.5 + tenants/shared/adapters/nobody*0.5")))
    assert (failed.code, failed.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert "nobody" in failed.message


async def test_an_adapter_of_which_no_sum_is_defined_is_refused_by_name(plane: DataPlane) -> None:
    plane.add_adapter("default/pirate", "ab" * 32)
    poet = plane.add_adapter("default/poet", "cd" * 32)
    plane.engine.whole_adapters[poet.spec.source] = "it is a DoRA adapter"
    failed = await failure(plane.generate(make_spec(model="pirate*0.5 + poet*0.5")))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["spec.model"])
    assert poet.version_name in failed.message
    assert "it is a DoRA adapter" in failed.message


async def test_every_member_is_in_use_while_the_request_runs(plane: DataPlane) -> None:
    versions = [plane.add_adapter("default/pirate", "ab" * 32), plane.add_adapter("default/poet", "cd" * 32)]

    def users() -> list[int]:
        return [plane.registry.get(version.version_name).num_requests for version in versions]

    plane.engine.steps_allowed = 0
    running = asyncio.ensure_future(plane.generate(make_spec(model="pirate*0.5 + poet*0.5")))
    await plane.engine.until(lambda: bool(plane.engine.requests))
    assert users() == [1, 1]
    plane.engine.allow_steps(100)
    await running
    assert users() == [0, 0]
