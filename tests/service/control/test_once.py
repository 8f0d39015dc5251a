"""Calls that are sent twice."""

import asyncio
import uuid
import weakref
from typing import cast

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from loraplex_service.control.once import Once


async def test_calls_with_the_same_id_happen_once() -> None:
    once, calls, gate = Once(), [], asyncio.Event()

    async def work() -> Int64Value:
        calls.append(1)
        await gate.wait()
        return Int64Value(value=len(calls))

    request_id = str(uuid.uuid4())
    both = [asyncio.create_task(once.run("Do", request_id, work)) for _ in range(2)]
    await asyncio.sleep(0)
    gate.set()
    assert [answer.value for answer in await asyncio.gather(*both)] == [1, 1]
    assert (await once.run("Do", request_id, work)).value == 1
    assert (await once.run("DoOther", request_id, work)).value == 2


async def test_calls_without_an_id_happen_each_time() -> None:
    once, calls = Once(), []

    async def work() -> Int64Value:
        calls.append(1)
        return Int64Value(value=len(calls))

    assert [(await once.run("Do", "", work)).value for _ in range(2)] == [1, 2]


async def test_a_failure_is_not_remembered() -> None:
    once, outcomes = Once(), iter([ValueError("not now"), None])

    async def work() -> StringValue:
        error = next(outcomes)
        if error is not None:
            raise error
        return StringValue(value="done")

    request_id = str(uuid.uuid4())
    with pytest.raises(ValueError, match="not now"):
        await once.run("Do", request_id, work)
    assert (await once.run("Do", request_id, work)).value == "done"


async def test_a_caller_that_goes_away_does_not_stop_what_it_began() -> None:
    once, gate, done = Once(), asyncio.Event(), asyncio.Event()

    async def work() -> Empty:
        await gate.wait()
        done.set()
        return Empty()

    caller = asyncio.create_task(once.run("Do", str(uuid.uuid4()), work))
    await asyncio.sleep(0)
    caller.cancel()
    gate.set()
    await done.wait()
    assert caller.cancelled() or caller.cancelling()


async def test_only_the_latest_calls_are_remembered() -> None:
    once, calls = Once(capacity=1), []

    async def work() -> Int64Value:
        calls.append(1)
        return Int64Value(value=len(calls))

    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    answers = [await once.run("Do", request_id, work) for request_id in (first, second, first)]
    assert [answer.value for answer in answers] == [1, 2, 3]


async def test_answers_are_remembered_until_they_are_too_large_together() -> None:
    once, calls = Once(max_bytes=100), []

    async def work() -> StringValue:
        calls.append(1)
        return StringValue(value=str(len(calls)) * 40)

    first, second, third = (str(uuid.uuid4()) for _ in range(3))
    answers = [await once.run("Do", request_id, work) for request_id in (first, second, first, third, second, first)]
    assert [answer.value[0] for answer in answers] == ["1", "2", "1", "3", "2", "4"]


async def test_an_answer_larger_than_what_may_be_remembered_is_forgotten() -> None:
    once, calls = Once(max_bytes=100), []

    async def work() -> StringValue:
        calls.append(1)
        return StringValue(value=str(len(calls)) * 200)

    request_id = str(uuid.uuid4())
    answers = [await once.run("Do", request_id, work) for _ in range(2)]
    assert [answer.value[0] for answer in answers] == ["1", "2"]


async def test_a_call_in_progress_is_not_forgotten_for_others() -> None:
    once, calls, gate = Once(capacity=1), [], asyncio.Event()

    async def slow() -> Int64Value:
        calls.append(1)
        await gate.wait()
        return Int64Value(value=len(calls))

    async def quick() -> Int64Value:
        return Int64Value()

    request_id = str(uuid.uuid4())
    first = asyncio.create_task(once.run("Do", request_id, slow))
    await asyncio.sleep(0)
    for _ in range(2):
        await once.run("Do", str(uuid.uuid4()), quick)
    again = asyncio.create_task(once.run("Do", request_id, slow))
    await asyncio.sleep(0)
    gate.set()
    assert [answer.value for answer in await asyncio.gather(first, again)] == [1, 1]


async def test_of_a_call_that_happened_only_the_answer_is_remembered() -> None:
    """Its task would hold the call itself, as its context does."""
    once, tasks = Once(), []

    async def work() -> Int64Value:
        tasks.append(weakref.ref(cast("asyncio.Task[Int64Value]", asyncio.current_task())))
        return Int64Value(value=1)

    request_id = str(uuid.uuid4())
    assert [(await once.run("Do", request_id, work)).value for _ in range(2)] == [1, 1]
    await asyncio.sleep(0)  # the loop lets go of it
    assert [task() for task in tasks] == [None]
