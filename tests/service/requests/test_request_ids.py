"""The ids of a request: when its caller knows them, where they show, and how they end it."""

import asyncio
from typing import Any

import grpc
import pytest

from loraplex.v1.inference_pb2 import (
    BatchGenerateRequest,
    CancelGenerationRequest,
    GenerateRequest,
    GenerateResponse,
    StreamGenerateRequest,
)
from tests.service.data_plane import DataPlane, failure, make_spec, next_of
from tests.waits import MOST_SECONDS


async def id_of(call: Any) -> str:
    """From the initial metadata, which must come by itself."""
    async with asyncio.timeout(MOST_SECONDS):
        return str(dict(await call.initial_metadata())["loraplex-request-id"])


async def cancel(plane: DataPlane, *request_ids: str, **metadata: str) -> list[str]:
    request = CancelGenerationRequest(request_ids=request_ids)
    return list((await plane.stub.CancelGeneration(request, metadata=tuple(metadata.items()))).cancelled_request_ids)


async def cancel_own(plane: DataPlane, *client_request_ids: str) -> list[str]:
    request = CancelGenerationRequest(client_request_ids=client_request_ids)
    return list((await plane.stub.CancelGeneration(request)).cancelled_request_ids)


def generate(plane: DataPlane, **fields: Any) -> Any:
    """A call of Generate. As a stream of one message: gRPC for Python shows the headers of others at their end."""
    request, answer = GenerateRequest, GenerateResponse
    method = "/loraplex.v1.InferenceService/Generate"
    call = plane.channel.unary_stream(method, request.SerializeToString, answer.FromString)
    return call(request(spec=make_spec(**fields)))


def waiting(plane: DataPlane, **fields: Any) -> Any:
    """A call of Generate whose request the engine does not get to."""
    plane.engine.steps_allowed = 0
    return generate(plane, **fields)


def cold_adapter(plane: DataPlane) -> str:
    plane.engine.loads_allowed = False
    return plane.add_adapter().version_name


# ---- when they are known ---------------------------------------------------------------------------------------------


async def test_the_server_and_not_the_caller_gives_a_request_its_id(plane: DataPlane) -> None:
    call = plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(client_request_id="mine")))
    events = [event async for event in call]
    request_id = events[0].started.request_id
    assert request_id not in ("", "mine")
    assert await id_of(call) == request_id
    assert dict(await call.trailing_metadata())["loraplex-request-id"] == request_id


async def test_a_unary_call_knows_its_id_before_the_first_token(plane: DataPlane) -> None:
    call = waiting(plane)
    request_id = await id_of(call)
    plane.engine.allow_steps(10)
    assert (await next_of(call)).request_id == request_id


async def test_a_stream_knows_its_id_before_the_first_token(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec()))
    request_id = await id_of(call)
    plane.engine.allow_steps(10)
    assert (await next_of(call)).started.request_id == request_id
    call.cancel()


async def test_a_request_that_waits_for_its_adapter_knows_its_id_and_its_version(plane: DataPlane) -> None:
    version = cold_adapter(plane)
    call = generate(plane, model="pirate")
    headers = dict(await call.initial_metadata())
    assert headers["loraplex-adapter-version"] == version
    assert headers["loraplex-adapter"] == version.partition("@")[0]
    plane.engine.allow_loads()
    assert (await next_of(call)).request_id == headers["loraplex-request-id"]


async def test_no_version_is_named_where_the_base_model_answers_alone(plane: DataPlane) -> None:
    cold_adapter(plane)
    policy = {"on_cold": "ON_COLD_USE_BASE"}
    call = generate(plane, model="pirate", adapter_policy=policy)
    assert "loraplex-adapter-version" not in dict(await call.initial_metadata())
    assert (await next_of(call)).target.fell_back_to_base


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "nothing"},
        {"sampling": {"top_p": 7}},
        {"prompt": {"text": "x" * 5000}},
        {"model": "pirate", "adapter_policy": {"on_cold": "ON_COLD_FAIL"}},
    ],
    ids=["unknown", "invalid", "too long", "cold"],
)
async def test_what_is_refused_sends_no_initial_metadata_so_that_it_may_be_retried(
    plane: DataPlane, fields: Any
) -> None:
    cold_adapter(plane)
    call = generate(plane, **fields)
    await failure(next_of(call))
    assert not dict(await call.initial_metadata())


async def test_the_first_message_of_a_batch_has_the_ids_of_all_items(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=[make_spec()] * 3, max_concurrency=1))
    started = (await next_of(call)).started
    plane.engine.allow_steps(100)
    items = [await next_of(call) for _ in range(3)]
    assert {item.index: item.response.request_id for item in items} == dict(enumerate(started.request_ids))


# ---- how they end a request ------------------------------------------------------------------------------------------


async def test_a_unary_request_that_waits_is_cancelled_by_its_id(plane: DataPlane) -> None:
    call = waiting(plane)
    request_id = await id_of(call)
    await plane.engine.until(lambda: bool(plane.engine.sequences))
    assert await cancel(plane, request_id, request_id, "unknown") == [request_id]
    failed = await failure(next_of(call))
    assert (failed.code, failed.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
    await plane.engine.until_idle()


async def test_a_request_that_waits_for_its_adapter_is_cancelled_by_its_id(plane: DataPlane) -> None:
    cold_adapter(plane)
    call = generate(plane, model="pirate")
    request_id = await id_of(call)
    assert await cancel(plane, request_id) == [request_id]
    assert (await failure(next_of(call))).reason == "CANCELLED"
    plane.engine.allow_loads()
    assert not plane.engine.requests


async def test_an_item_of_a_batch_that_waits_for_its_turn_is_cancelled_by_its_id(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=[make_spec()] * 2, max_concurrency=1))
    started = (await next_of(call)).started
    assert await cancel(plane, started.request_ids[1]) == [started.request_ids[1]]
    cancelled = await next_of(call)
    assert cancelled.index == 1
    assert cancelled.error.code == grpc.StatusCode.CANCELLED.value[0]
    plane.engine.allow_steps(100)
    assert (await next_of(call)).response.request_id == started.request_ids[0]


async def test_an_item_of_a_batch_that_runs_is_cancelled_alone(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=[make_spec()] * 2))
    started = (await next_of(call)).started
    await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
    await cancel(plane, started.request_ids[0])
    assert (await next_of(call)).error.code == grpc.StatusCode.CANCELLED.value[0]
    plane.engine.allow_steps(100)
    assert (await next_of(call)).index == 1


async def test_an_item_that_is_not_the_callers_tenants_is_left_alone(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    metadata = (("loraplex-tenant", "acme"),)
    call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=[make_spec()]), metadata=metadata)
    started = (await next_of(call)).started
    assert await cancel(plane, *started.request_ids) == []
    call.cancel()


async def test_every_request_of_the_callers_own_id_is_cancelled_and_no_other(plane: DataPlane) -> None:
    calls = [waiting(plane, client_request_id=name) for name in ("mine", "mine", "other")]
    ids = [await id_of(call) for call in calls]
    assert sorted(await cancel_own(plane, "mine")) == sorted(ids[:2])
    assert [(await failure(next_of(call))).reason for call in calls[:2]] == ["CANCELLED", "CANCELLED"]
    plane.engine.allow_steps(100)
    assert (await next_of(calls[2])).client_request_id == "other"


async def test_the_empty_id_is_nobodys(plane: DataPlane) -> None:
    call = waiting(plane)
    await id_of(call)
    assert await cancel_own(plane, "") == []
    plane.engine.allow_steps(100)
    assert await next_of(call)


# ---- what the caller gave comes back ---------------------------------------------------------------------------------

OWN: Any = {"client_request_id": "mine", "labels": {"team": "x"}}


async def test_a_unary_answer_repeats_the_callers_own_id_and_labels(plane: DataPlane) -> None:
    response = await plane.generate(make_spec(**OWN))
    assert (response.client_request_id, dict(response.labels)) == ("mine", {"team": "x"})


async def test_a_stream_repeats_the_callers_own_id_and_labels(plane: DataPlane) -> None:
    started = (await plane.stream(make_spec(**OWN)))[0].started
    assert (started.client_request_id, dict(started.labels)) == ("mine", {"team": "x"})


async def test_each_item_of_a_batch_has_its_own_name_or_that_of_the_call(plane: DataPlane) -> None:
    request = BatchGenerateRequest(specs=[make_spec(**OWN), make_spec()])
    call = plane.stub.BatchGenerate(request, metadata=(("x-request-id", "theirs"),))
    items = [item.response async for item in call if item.HasField("response")]
    assert {item.client_request_id for item in items} == {"mine", "theirs"}


async def test_the_metadata_names_a_request_whose_spec_does_not(plane: DataPlane) -> None:
    metadata = (("x-request-id", "theirs"),)
    unnamed = await plane.generate(make_spec(), metadata=metadata)
    named = await plane.generate(make_spec(**OWN), metadata=metadata)
    assert (unnamed.client_request_id, named.client_request_id) == ("theirs", "mine")


async def test_a_name_in_the_metadata_that_is_too_long_to_keep_is_refused(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec(), metadata=(("x-request-id", "x" * 129),)))
    assert (failed.reason, failed.fields) == ("INVALID_PARAMETER", ["x-request-id"])


# ---- seeds -----------------------------------------------------------------------------------------------------------


async def test_a_seed_of_the_servers_is_a_number_that_every_language_holds(plane: DataPlane) -> None:
    seeds = [(await plane.generate(make_spec())).seed for _ in range(64)]
    assert max(seeds) < 1 << 53
    assert len(set(seeds)) == 64
