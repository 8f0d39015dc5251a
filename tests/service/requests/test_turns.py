"""Turns: how many at once, who is next, and how much may wait."""

import asyncio
import gc
import os
import sys
import threading
import weakref
from contextlib import AsyncExitStack, suppress

import pytest

from loraplex_service.errors import Unavailable
from loraplex_service.requests.turns import NICER, SMALLEST, Pieces, TurnLimits, Turns

MIB = 1 << 20


def turns_of(at_once: int = 1, size_at_once: int = 4 * MIB, size_in_all: int = 16 * MIB) -> Turns:
    return Turns("texts cannot be worked on", TurnLimits(at_once, size_at_once, size_in_all))


class Waiting:
    """Work of tenants that wait behind one that has the turn, and the order in which they get it."""

    def __init__(self, turns: Turns) -> None:
        self.order: list[str] = []
        self._turns = turns
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, tenant: str, size: int = MIB, weight: float = 1.0) -> asyncio.Task[None]:
        async def work() -> None:
            async with self._turns.turn(tenant, weight, size):
                self.order.append(tenant)

        self._tasks.append(asyncio.create_task(work()))
        await asyncio.sleep(0)  # the task begins: it has its turn, or waits for it
        return self._tasks[-1]

    async def end(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_next_is_who_was_served_least() -> None:
    turns = turns_of()
    waiting = Waiting(turns)
    async with turns.turn("a", 1.0, MIB):
        for _ in range(3):
            await waiting.add("a")
        await waiting.add("b")
    await waiting.end()
    assert waiting.order.index("b") < 2


async def test_shares_go_by_weight() -> None:
    turns = turns_of()
    waiting = Waiting(turns)
    async with turns.turn("first", 1.0, MIB):
        for _ in range(4):
            await waiting.add("heavy", weight=2.0)
        for _ in range(4):
            await waiting.add("light")
    await waiting.end()
    assert waiting.order[:6].count("heavy") == 4


async def test_a_large_one_leaves_a_place_to_others() -> None:
    turns = turns_of(at_once=2)
    waiting = Waiting(turns)
    async with turns.turn("a", 1.0, MIB):
        await waiting.add("a", size=MIB)
        await waiting.add("b", size=SMALLEST)
        assert waiting.order == ["b"]
    await waiting.end()


async def test_no_more_at_once_than_fit_together() -> None:
    turns = turns_of(at_once=3)
    waiting = Waiting(turns)
    async with turns.turn("a", 1.0, 3 * MIB):
        await waiting.add("b", size=2 * MIB)
        assert waiting.order == []
    await waiting.end()
    assert waiting.order == ["b"]


async def test_one_that_is_larger_than_all_room_is_let_in_alone() -> None:
    async with turns_of(size_in_all=MIB).turn("a", 1.0, 8 * MIB):
        pass


async def test_too_much_waiting_is_refused_at_once() -> None:
    turns = turns_of(size_in_all=4 * MIB)
    async with turns.turn("a", 1.0, 4 * MIB):
        with pytest.raises(Unavailable, match="texts cannot be worked on now"):
            await turns._begin("a", 1.0, MIB)


async def test_who_fills_the_queue_keeps_nobody_else_out() -> None:
    turns = turns_of(at_once=2, size_at_once=8 * MIB, size_in_all=4 * MIB)
    async with turns.turn("a", 1.0, 4 * MIB), turns.turn("b", 1.0, MIB):
        pass


async def test_many_tenants_together_wait_with_no_more_than_twice_the_limit() -> None:
    turns = turns_of(at_once=100, size_at_once=100 * MIB, size_in_all=4 * MIB)
    async with AsyncExitStack() as stack:
        for number in range(100):
            with suppress(Unavailable):
                await stack.enter_async_context(turns.turn(str(number), 1.0, MIB))
        assert turns._held <= 8 * MIB


async def test_who_goes_away_leaves_the_queue() -> None:
    turns = turns_of()
    waiting = Waiting(turns)
    async with turns.turn("a", 1.0, MIB):
        gone = await waiting.add("b")
        await waiting.add("c")
        gone.cancel()
        await asyncio.wait([gone])
        assert turns._held == 2 * MIB
    await waiting.end()
    assert (waiting.order, turns._held, turns._tenants) == (["c"], 0, {})


async def test_a_thread_keeps_its_turn_though_its_caller_is_gone() -> None:
    turns, go_on = turns_of(), threading.Event()
    waiting = Waiting(turns)
    caller = asyncio.create_task(turns.in_thread("a", 1.0, MIB, go_on.wait))
    await asyncio.sleep(0)  # the task begins, and with it the thread
    caller.cancel()
    await waiting.add("b")
    assert waiting.order == []
    go_on.set()
    await waiting.end()
    assert waiting.order == ["b"]


async def test_work_in_pieces_lets_others_go_on_between_them_and_keeps_its_turn() -> None:
    order: list[str] = []

    def work(name: str) -> Pieces[str]:
        for _ in range(3):
            order.append(name)
            yield
        return name

    async def others() -> None:
        for _ in range(3):
            order.append("others")
            await asyncio.sleep(0)

    turns = turns_of()
    first, second = (turns.in_pieces(name, 1.0, MIB, work(name)) for name in ("first", "second"))
    assert await asyncio.gather(first, second, others()) == ["first", "second", None]
    assert order == [*["first", "others"] * 3, *["second"] * 3]


async def test_work_in_pieces_that_fails_or_whose_caller_is_gone_gives_up_its_turn() -> None:
    def work() -> Pieces[None]:
        yield
        raise ValueError

    turns = turns_of()
    with pytest.raises(ValueError):
        await turns.in_pieces("a", 1.0, MIB, work())
    gone = asyncio.create_task(turns.in_pieces("a", 1.0, MIB, work()))
    await asyncio.sleep(0)  # the task begins
    gone.cancel()
    await asyncio.wait([gone])
    assert (turns._held, turns._running) == (0, [])


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux only")
async def test_long_work_leaves_the_cores_to_the_event_loop() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert await turns_of().in_thread("a", 1.0, MIB, niceness) == min(before + NICER, 19)
    assert niceness() == before


async def test_nothing_stays_of_what_a_thread_had_at_hand_when_it_failed() -> None:
    turns, at_hand = turns_of(), []

    def fail() -> None:
        large = threading.Event()
        at_hand.append(weakref.ref(large))
        raise ValueError

    gc.disable()
    try:
        with suppress(ValueError):
            await turns.in_thread("a", 1.0, MIB, fail)
        await asyncio.sleep(0)  # the loop lets go of what it has just called
        assert at_hand[0]() is None
    finally:
        gc.enable()
