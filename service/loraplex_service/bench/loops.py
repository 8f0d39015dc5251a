"""Loops that send requests: closed, where so many clients wait for their answers, and open. Standard library only."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from loraplex_service.bench.records import Record


class Item(Protocol):
    """One request."""

    @property
    def prompt(self) -> Sequence[int]: ...  # token ids
    @property
    def output(self) -> int: ...  # tokens
    @property
    def moment(self) -> float: ...  # seconds from the start to its arrival, where requests come by themselves


ItemT = TypeVar("ItemT", bound=Item)
ItemT_contra = TypeVar("ItemT_contra", contravariant=True, bound=Item)


class Generate(Protocol[ItemT_contra]):
    """Sends one request, calls on_tokens(n) whenever n more tokens have arrived, and returns the token ids at the end.

    Raises RequestError where others are to go on, and anything else where none are.
    """

    def __call__(self, item: ItemT_contra, on_tokens: Callable[[int], None], /) -> Awaitable[list[int]]: ...


class RequestError(Exception):
    """One request failed. Its record says why."""


Outcome = tuple[list[Record], list[list[int]]]  # of each request what its sender saw, and the token ids


async def closed_loop(generate: Generate[ItemT], work: Sequence[ItemT], concurrency: int) -> Outcome:
    """`concurrency` clients, each of which sends its next request when its last one has ended."""
    todo = iter(enumerate(work))
    records: list[Record] = []
    tokens: list[list[int]] = [[] for _ in work]

    async def client() -> None:
        for index, item in todo:
            record = Record(time.perf_counter(), len(item.prompt), item.output)
            tokens[index] = await _send(generate, item, record)
            records.append(record)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return records, tokens


async def open_loop(generate: Generate[ItemT], work: Sequence[ItemT]) -> Outcome:
    """Each request when its moment has come, whatever became of others.

    A request counts from its own moment, even if the sender was late.
    """
    start = time.perf_counter()

    async def client(item: ItemT) -> tuple[Record, list[int]]:
        moment = start + item.moment
        await asyncio.sleep(moment - time.perf_counter())
        record = Record(moment, len(item.prompt), item.output, late=time.perf_counter() - moment)
        return record, await _send(generate, item, record)

    answers = await asyncio.gather(*(client(item) for item in work))
    return [record for record, _ in answers], [tokens for _, tokens in answers]


async def drive(generate: Generate[ItemT], work: Sequence[ItemT], concurrency: int | None) -> Outcome:
    """A closed loop of so many clients; None: an open loop."""
    if concurrency is None:
        return await open_loop(generate, work)
    return await closed_loop(generate, work, concurrency)


def moments(rng: random.Random, rate: float, variation: float, count: int) -> Iterator[float]:
    """When requests arrive, `rate` a second on average.

    variation: the coefficient of variation of the time between two. 1: Poisson; above: in bursts; 0: evenly.
    """
    if not variation:
        return (number / rate for number in range(1, count + 1))
    shape = 1 / variation**2
    return itertools.accumulate(rng.gammavariate(shape, 1 / (shape * rate)) for _ in range(count))


async def _send(generate: Generate[ItemT], item: ItemT, record: Record) -> list[int]:
    """The token ids of one request. Raises RuntimeError where there are not as many as it asked for."""
    try:
        tokens = await generate(item, record.arrive)
    except RequestError as failure:
        record.error = str(failure)
        return []
    received = sum(count for _, count in record.arrivals)
    if received != item.output:
        raise RuntimeError(f"asked for {item.output} tokens, got {received}")
    return tokens
