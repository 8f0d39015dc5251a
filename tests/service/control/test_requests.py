"""Names, pages and calls sent twice."""

import asyncio
import uuid
import weakref
from itertools import pairwise
from typing import cast

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from loraplex.v1.models_pb2 import ListModelsRequest, Model
from loraplex_service.control.requests import PAGE_BYTES, Once, adapter_name, model_id, page, tenant_id
from loraplex_service.errors import InvalidRequest

ITEMS = [f"item-{number:02d}" for number in range(25)]


def named(item: str) -> Model:
    return Model(name=item)


def pages(items: list[str], size: int) -> list[list[str]]:
    found, token = [], ""
    while True:
        shown, token = page(items, str, named, ListModelsRequest(page_size=size, page_token=token))
        found.append([model.name for model in shown])
        if not token:
            return found


@pytest.mark.parametrize("size", [1, 7, 25, 1000])
def test_pages_together_are_all_items_once(size: int) -> None:
    found = pages(ITEMS, size)
    assert [item for shown in found for item in shown] == ITEMS
    assert all(len(shown) == size for shown, _ in pairwise(found))


def test_a_page_goes_on_after_an_item_that_is_gone() -> None:
    _, token = page(ITEMS, str, named, ListModelsRequest(page_size=5))
    rest = [item for item in ITEMS if item != "item-04"]
    shown, _ = page(rest, str, named, ListModelsRequest(page_size=2, page_token=token))
    assert [model.name for model in shown] == ["item-05", "item-06"]


def test_a_page_of_large_messages_ends_early_and_the_next_goes_on() -> None:
    def large(item: str) -> Model:
        return Model(name=item, source="x" * (PAGE_BYTES // 4))

    shown, token = page(ITEMS, str, large, ListModelsRequest())
    assert [model.name for model in shown] == ITEMS[:4]
    shown, _ = page(ITEMS, str, large, ListModelsRequest(page_token=token))
    assert shown[0].name == ITEMS[4]


@pytest.mark.parametrize("token", ["x", "//8=", "é"])
def test_a_token_of_ones_own_making_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match="page_token"):
        page(ITEMS, str, named, ListModelsRequest(page_token=token))


def test_names_give_their_ids() -> None:
    assert model_id("models/llama-3.1-8b", "name") == "llama-3.1-8b"
    assert tenant_id("tenants/acme", "parent") == "acme"
    assert tenant_id("tenants/-", "parent", all_allowed=True) is None
    assert adapter_name("tenants/a/adapters/b@0123456789ab", "name") == "tenants/a/adapters/b@0123456789ab"


@pytest.mark.parametrize(
    "name", ["", "models", "models/", "models/a/b", "models/A", "models/a\n", "models/" + "a" * 64]
)
def test_what_is_no_name_of_a_model_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        model_id(name, "name")


@pytest.mark.parametrize(
    "name",
    ["pirate", "tenants/a/adapters/b@", "tenants/a/adapters/b@xyz", "tenants/-/adapters/b", "tenants/a/adapters/.."],
)
def test_what_is_no_name_of_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="does not name an adapter here"):
        adapter_name(name, "name")


def test_a_tenant_of_all_is_refused_where_one_is_needed() -> None:
    with pytest.raises(InvalidRequest, match=r"tenants/\{tenant\} is expected"):
        tenant_id("tenants/-", "parent")


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
