"""BatchGenerate: many specs in one call, each of which succeeds or fails alone."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from loraplex.v1.inference_pb2 import BatchGenerateRequest, BatchGenerateResponse, PartialUsage
from loraplex_service.errors import Unavailable
from tests.service.data_plane import DataPlane, failure, make_spec


async def run(plane: DataPlane, *specs: Any, **fields: Any) -> dict[int, BatchGenerateResponse]:
    call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=specs, **fields))
    return {response.index: response async for response in call if not response.HasField("started")}


async def test_each_spec_has_its_result(plane: DataPlane) -> None:
    results = await run(plane, make_spec("ab"), make_spec("xy"))
    assert {index: result.response.outputs[0].text for index, result in results.items()} == {0: "ababa", 1: "xyxyx"}
    assert len({result.response.request_id for result in results.values()}) == 2


async def test_results_come_as_they_are_ready(plane: DataPlane) -> None:
    call = plane.stub.BatchGenerate(
        BatchGenerateRequest(specs=[make_spec(stopping={"max_tokens": 50}), make_spec(stopping={"max_tokens": 1})])
    )
    assert [response.index async for response in call if not response.HasField("started")] == [1, 0]


async def test_one_that_fails_fails_alone(plane: DataPlane) -> None:
    plane.engine.errors.append("logits are NaN")
    results = await run(plane, make_spec(), make_spec(sampling={"n": 0}), make_spec(), max_concurrency=1)
    assert results[2].response.outputs[0].text == "abcab"
    broken, invalid = results[0].error, results[1].error
    assert broken.code == grpc.StatusCode.INTERNAL.value[0]
    assert invalid.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    info, request = ErrorInfo(), BadRequest()
    invalid.details[0].Unpack(info)
    invalid.details[1].Unpack(request)
    assert info.reason == "INVALID_PARAMETER"
    assert request.field_violations[0].field == "specs[1].sampling.n"


async def test_what_a_failed_item_used_is_its_own(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    running = asyncio.ensure_future(run(plane, make_spec("abc"), make_spec("defgh")))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
    plane.entrance.end_all(Unavailable("ENGINE_RESTARTING", "soon"))
    results = await running
    for index, tokens in ((0, 3), (1, 5)):
        usage = PartialUsage()
        [packed] = [detail for detail in results[index].error.details if detail.Is(PartialUsage.DESCRIPTOR)]
        packed.Unpack(usage)
        assert usage.usage.prompt_tokens == tokens


async def test_a_fault_of_the_service_in_one_item_is_logged_and_internal(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("password")

    monkeypatch.setattr("loraplex_service.requests.prepared.prompt_tokens", broken)
    results = await run(plane, make_spec())
    assert results[0].error.code == grpc.StatusCode.INTERNAL.value[0]
    assert "password" not in results[0].error.message
    assert len(plane.errors.records) == 1
    plane.errors.records.clear()


async def test_no_more_run_at_once_than_asked_for(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    running = asyncio.ensure_future(run(plane, *[make_spec()] * 5, max_concurrency=2))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
    most = 2
    while not running.done():
        plane.engine.allow_steps(1)
        await asyncio.sleep(0)
        most = max(most, len(plane.engine.sequences))
    assert len(await running) == 5
    assert most == 2


async def test_cancelling_a_batch_ends_all_of_it(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.stub.BatchGenerate(BatchGenerateRequest(specs=[make_spec()] * 5, max_concurrency=3))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 3)
    call.cancel()
    await plane.engine.until_idle()
    await asyncio.wait_for(plane.admission.wait_idle(), 20)
    assert len(plane.engine.requests) == 3


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (BatchGenerateRequest(), "specs"),
        (BatchGenerateRequest(specs=[make_spec()] * 257), "specs"),
        (BatchGenerateRequest(specs=[make_spec()], max_concurrency=0), "max_concurrency"),
    ],
)
async def test_limits_of_a_batch(plane: DataPlane, request_: BatchGenerateRequest, field: str) -> None:
    async def read() -> None:
        async for _ in plane.stub.BatchGenerate(request_):
            pass

    failed = await failure(read())
    assert (failed.reason, failed.fields) == ("INVALID_PARAMETER", [field])
