"""More than the engine can do: a short queue, a quick answer to the rest, and an open ear for those who look."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2

from loraplex_service.admission.admission import AdmissionLimits
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec
from tests.service.health_calls import health_of

FLOOD = 500


async def flood(plane: DataPlane, count: int = FLOOD, **call: Any) -> "list[asyncio.Task[Any]]":
    """So many requests at once to an engine that stands still; returns once each was let in or answered."""
    plane.engine.steps_allowed = 0
    tasks = [asyncio.ensure_future(plane.generate(make_spec(), **call)) for _ in range(count)]
    await plane.engine.until(lambda: sum(task.done() for task in tasks) + len(plane.engine.sequences) == count)
    return tasks


async def test_what_does_not_fit_the_queue_is_refused_at_once_with_a_time_to_come_again(
    byte_tokenizer: Tokenizer,
) -> None:
    async with data_plane(byte_tokenizer, AdmissionLimits(sequences=2.0, retry_after_seconds=1.5)) as plane:
        tasks = await flood(plane)
        queued = 2 * plane.engine.limits.max_num_seqs
        assert len(plane.engine.sequences) == queued
        refused = [await failure(task) for task in tasks if task.done()]
        assert {(failed.code, failed.reason) for failed in refused} == {(grpc.StatusCode.UNAVAILABLE, "OVERLOADED")}
        assert {failed.detail(RetryInfo()).retry_delay.ToMilliseconds() for failed in refused} == {1500}
        plane.engine.allow_steps(1000)
        answers = [await task for task in tasks if not task.done() or task.exception() is None]
        assert len(answers) == queued


async def test_health_is_told_and_requests_are_cancelled_while_the_engine_stands_still(plane: DataPlane) -> None:
    tasks = await flood(plane)
    assert await health_of(plane.channel) == health_pb2.HealthCheckResponse.SERVING  # a full queue is not dead
    for task in tasks:
        task.cancel()
    await plane.engine.until_idle()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert plane.admission.idle


async def test_a_full_queue_is_refused_before_the_prompt_is_tokenised(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = await flood(plane)

    async def never(*arguments: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr("loraplex_service.requests.prepared.prompt_tokens", never)
    assert (await failure(plane.generate(make_spec()))).reason == "OVERLOADED"
    plane.engine.allow_steps(1000)
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_deadline_of_the_call_is_what_admission_looks_at(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []
    enter = plane.admission.enter

    @contextmanager
    def watched(*arguments: Any) -> Iterator[None]:
        seen.append(arguments[-1])
        with enter(*arguments):
            yield

    monkeypatch.setattr(plane.admission, "enter", watched)
    await plane.generate(make_spec(), timeout=50)
    await plane.generate(make_spec())
    with_deadline, without = seen
    assert with_deadline is not None
    assert 0 < with_deadline <= 50
    assert without is None


async def test_one_tenants_flood_leaves_another_its_share_of_the_queue(plane: DataPlane) -> None:
    tasks = await flood(plane, metadata=(("loraplex-tenant", "loud"),))
    quiet = asyncio.ensure_future(plane.generate(make_spec(), metadata=(("loraplex-tenant", "quiet"),)))
    await plane.engine.until(lambda: any(request.tenant == "quiet" for request in plane.engine.requests))
    plane.engine.allow_steps(1000)
    assert (await quiet).usage.completion_tokens == 5
    await asyncio.gather(*tasks, return_exceptions=True)
