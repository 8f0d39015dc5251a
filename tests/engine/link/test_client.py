"""The client of one engine, fed by hand: signs of life, and the end."""

import asyncio

import pytest

from loraplex_engine.link.messages import Ping, Pong
from tests.engine.link.conftest import KEY, STATS, Wire


def test_stats_are_those_of_the_last_step() -> None:
    wire = Wire()
    wire.step()
    assert wire.client.stats == STATS


async def test_each_ping_gets_its_own_pong(wire: Wire) -> None:
    first = asyncio.ensure_future(wire.client.ping())
    second = asyncio.ensure_future(wire.client.ping())
    await asyncio.sleep(0)
    nonces = [message.nonce for message in wire.sent if isinstance(message, Ping)]
    wire.client.deliver(Pong(nonces[1], STATS))
    assert (await second).nonce == nonces[1]
    assert not first.done()
    first.cancel()


async def test_a_late_pong_is_dropped(wire: Wire) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await wire.client.ping()
    [ping] = [message for message in wire.sent if isinstance(message, Ping)]
    wire.client.deliver(Pong(ping.nonce, STATS))
    assert wire.client.stats == STATS


async def test_when_the_engine_is_gone_everything_that_waits_ends_with_the_error(wire: Wire) -> None:
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        waiting = [
            asyncio.ensure_future(anext(outputs)),
            asyncio.ensure_future(wire.client.adapters.load(KEY, "/a")),
            asyncio.ensure_future(wire.client.adapters.unload(KEY)),
            asyncio.ensure_future(wire.client.ping()),
        ]
        await asyncio.sleep(0)
        wire.client.fail(ConnectionError("gone"))
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(result) for result in results] == ["gone"] * 4
    assert wire.aborted == []  # nobody is there to hear it


async def test_when_the_engine_is_gone_later_calls_end_with_the_error(wire: Wire) -> None:
    wire.client.fail(ConnectionError("gone"))
    wire.client.fail(ConnectionError("gone again"))
    with pytest.raises(ConnectionError, match=r"gone$"):
        wire.client.requests.generate(wire.request())
    with pytest.raises(ConnectionError):
        await wire.client.adapters.load(KEY, "/a")
    with pytest.raises(ConnectionError):
        await wire.client.adapters.unload(KEY)
    with pytest.raises(ConnectionError):
        await wire.client.ping()
    assert wire.sent == []
