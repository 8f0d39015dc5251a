"""What one caller may take of what all share."""

import asyncio
from contextlib import suppress

from loraplex_service.admission.places import Refusals
from tests.waits import MOST_SECONDS

FOREVER = 3600.0


async def waiting(refusals: Refusals, count: int) -> "list[asyncio.Task[None]]":
    """So many who wait for their turn, in order."""
    tasks = [asyncio.create_task(refusals.turn()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def leave(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_refusal_waits_for_those_before_it() -> None:
    refusals = Refusals(pause_seconds=FOREVER)
    first, second = await waiting(refusals, 2)
    assert not first.done()
    assert not second.done()
    await leave(first)
    await leave(second)


async def test_each_refusal_has_its_turn() -> None:
    refusals = Refusals(pause_seconds=0)
    async with asyncio.timeout(MOST_SECONDS):
        await asyncio.gather(*await waiting(refusals, 100))


async def test_nobody_waits_where_too_many_do() -> None:
    refusals = Refusals(pause_seconds=FOREVER, most_waiting=1)
    [first] = await waiting(refusals, 1)
    async with asyncio.timeout(MOST_SECONDS):
        await refusals.turn()
    assert not first.done()
    await leave(first)


async def test_who_leaves_takes_no_turn() -> None:
    refusals = Refusals(pause_seconds=FOREVER, most_waiting=1)
    [gone] = await waiting(refusals, 1)
    await leave(gone)
    [next_one] = await waiting(refusals, 1)
    assert not next_one.done()  # it waits in the place of the one who left
    await leave(next_one)
