"""Requests whose adapter is in host memory and not on the device, where it is needed."""

import pytest
from grpc import StatusCode as Code

from loraplex_adapters.errors import COLD, TOO_LARGE
from loraplex_adapters.residency import Residency
from loraplex_engine.link.messages import AdaptersChanged, AdapterStatus, WantAdapter
from tests.service.data_plane import DataPlane, failure, make_spec

POLICIES = {"fails": {"on_cold": "ON_COLD_FAIL"}, "goes without": {"on_cold": "ON_COLD_USE_BASE"}}


@pytest.fixture(params=["pirate", "pirate*0.5"])
async def model(plane: DataPlane, request: pytest.FixtureRequest) -> str:
    """An adapter, and a sum of it, that has been loaded and is not on the device."""
    version = plane.add_adapter()
    await plane.engine.client.adapters.load(version.key, "/adapters/default/pirate")
    return request.param


def wishes_to_bring(plane: DataPlane) -> list[WantAdapter]:
    wishes = [message for message in plane.engine.received if isinstance(message, WantAdapter)]
    return [wish for wish in wishes if wish.least is Residency.DEVICE]


def brought(plane: DataPlane) -> list[str]:
    return [wish.key.name for wish in wishes_to_bring(plane)]


async def test_one_that_would_rather_fail_fails_at_once_and_brings_it_to_the_device(
    plane: DataPlane, model: str
) -> None:
    spec = make_spec(model=model, adapter_policy=POLICIES["fails"])
    failed = await failure(plane.generate(spec))
    assert (failed.code, failed.reason) == (Code.UNAVAILABLE, COLD)
    assert (plane.engine.requests, len(brought(plane))) == ([], 1)
    response = await plane.generate(spec)
    assert response.target.adapter_version


async def test_one_that_can_never_be_there_is_told_why_and_not_to_try_again(plane: DataPlane, model: str) -> None:
    spec = make_spec(model=model, adapter_policy=POLICIES["fails"])
    plane.engine.loads_allowed = False
    await failure(plane.generate(spec))
    [wish] = wishes_to_bring(plane)
    plane.engine.say(wish.key, wish.order, ["it needs 9 bytes on the device"], TOO_LARGE)
    failed = await failure(plane.generate(spec))
    assert (failed.code, failed.reason) == (Code.FAILED_PRECONDITION, TOO_LARGE)
    assert (await failure(plane.generate(spec))).reason == COLD  # it is tried again


async def test_one_that_would_rather_go_without_does_and_brings_it_to_the_device(plane: DataPlane, model: str) -> None:
    spec = make_spec(model=model, adapter_policy=POLICIES["goes without"])
    assert (await plane.generate(spec)).target.fell_back_to_base
    assert len(brought(plane)) == 1
    assert not (await plane.generate(spec)).target.fell_back_to_base


async def test_one_that_leaves_the_device_is_cold_again(plane: DataPlane) -> None:
    version = plane.add_adapter()
    await plane.engine.client.adapters.bring_to_device(version.key, "/adapters/default/pirate")
    spec = make_spec(model="pirate", adapter_policy=POLICIES["fails"])
    await plane.generate(spec)
    plane.engine.client.deliver(AdaptersChanged([AdapterStatus(version.key, 1, Residency.HOST)]))
    assert (await failure(plane.generate(spec))).reason == COLD


async def test_what_is_left_of_the_wait_goes_to_the_engine(plane: DataPlane, model: str) -> None:
    await plane.generate(make_spec(model=model, adapter_policy={"max_load_wait": {"seconds": 7}}))
    await plane.generate(make_spec(model=model))
    assert [request.adapter_wait_seconds for request in plane.engine.requests] == [7.0, 60.0]
    assert len(brought(plane)) == 1


async def test_an_adapter_that_was_on_the_device_as_the_request_arrived_is_not_waited_for_later(
    plane: DataPlane,
) -> None:
    version = plane.add_adapter()
    await plane.engine.client.adapters.bring_to_device(version.key, "/adapters/default/pirate")
    await plane.generate(make_spec(model="pirate", adapter_policy=POLICIES["fails"]))
    assert plane.engine.requests[0].adapter_wait_seconds == 0.0


async def test_a_wait_that_ends_in_the_engine_is_a_cold_adapter(plane: DataPlane, model: str) -> None:
    plane.engine.errors, plane.engine.error_reason = ["it is not on the device after a wait of 7 s"], COLD
    failed = await failure(plane.generate(make_spec(model=model)))
    assert (failed.code, failed.reason) == (Code.UNAVAILABLE, COLD)
    assert "7 s" in failed.message


async def test_the_base_model_waits_for_nothing(plane: DataPlane) -> None:
    await plane.generate(make_spec(adapter_policy=POLICIES["fails"]))
    assert plane.engine.requests[0].adapter_wait_seconds is None
