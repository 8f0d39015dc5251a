"""The adapters of one engine, which the test plays."""

import asyncio

import pytest

from loraplex_adapters.errors import COLD, TOO_LARGE, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    LoadAdapter,
    UnloadAdapter,
)
from tests.engine.link.conftest import KEY, LOADED, Wire


async def test_callers_share_one_load(wire: Wire) -> None:
    first = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    second = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    await asyncio.sleep(0)
    assert wire.sent == [LoadAdapter(KEY, "/a")]
    wire.client.deliver(LOADED)
    assert await first == await second == LOADED
    assert wire.client.adapters.loaded == {KEY: LOADED}


async def test_cancelling_one_caller_does_not_disturb_the_load(wire: Wire) -> None:
    first = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    second = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    wire.client.deliver(LOADED)
    assert await second == LOADED


async def test_a_rejected_adapter_says_why_and_may_be_tried_again(wire: Wire) -> None:
    loading = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    await asyncio.sleep(0)
    wire.client.deliver(AdapterFailed(KEY, ["x: wrong shape", "y: NaN"]))
    with pytest.raises(AdapterRejected, match="x: wrong shape; y: NaN"):
        await loading
    again = asyncio.ensure_future(wire.client.adapters.load(KEY, "/b"))
    await asyncio.sleep(0)
    wire.client.deliver(LOADED)
    assert await again == LOADED


async def test_unloading_waits_for_the_engine(wire: Wire) -> None:
    wire.client.deliver(LOADED)
    unloading = asyncio.ensure_future(wire.client.adapters.unload(KEY))
    await asyncio.sleep(0)
    assert KEY not in wire.client.adapters.loaded
    assert not unloading.done()
    wire.client.deliver(AdapterUnloaded(KEY))
    await unloading


async def test_unloading_waits_for_a_load_to_end_first(wire: Wire) -> None:
    """Else the answer to the load would come after the unload was sent, and say that the adapter is there."""
    loading = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    unloading = asyncio.ensure_future(wire.client.adapters.unload(KEY))
    await asyncio.sleep(0)
    assert wire.sent == [LoadAdapter(KEY, "/a")]
    wire.client.deliver(LOADED)
    await loading
    await asyncio.sleep(0)
    assert wire.sent == [LoadAdapter(KEY, "/a"), UnloadAdapter(KEY)]
    assert KEY not in wire.client.adapters.loaded
    wire.client.deliver(AdapterUnloaded(KEY))
    await unloading


async def test_a_second_answer_to_a_load_does_not_outlive_the_unload(wire: Wire) -> None:
    """An adapter that is brought to the device while it is being loaded is asked for twice, and may be said twice."""
    loading = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    bringing = asyncio.ensure_future(wire.client.adapters.bring_to_device(KEY, "/a"))
    await asyncio.sleep(0)
    assert wire.sent == [LoadAdapter(KEY, "/a"), LoadAdapter(KEY, "/a", Residency.DEVICE)]
    wire.client.deliver(LOADED)
    await loading
    unloading = asyncio.ensure_future(wire.client.adapters.unload(KEY))
    await asyncio.sleep(0)
    wire.client.deliver(LOADED)
    assert KEY not in wire.client.adapters.loaded
    wire.client.deliver(AdapterUnloaded(KEY))
    await unloading
    assert KEY not in wire.client.adapters.loaded
    bringing.cancel()


async def test_loading_takes_back_an_unload_that_waits(wire: Wire) -> None:
    wire.client.deliver(LOADED)
    unloading = asyncio.ensure_future(wire.client.adapters.unload(KEY))
    await asyncio.sleep(0)
    wire.client.adapters.start_loading(KEY, "/a")
    await unloading
    wire.client.deliver(LOADED)
    assert KEY in wire.client.adapters.loaded
    again = asyncio.ensure_future(wire.client.adapters.unload(KEY))
    await asyncio.sleep(0)
    assert wire.sent == [UnloadAdapter(KEY), LoadAdapter(KEY, "/a"), UnloadAdapter(KEY)]
    again.cancel()


async def bringing_begun(wire: Wire) -> "asyncio.Future[None]":
    bringing = asyncio.ensure_future(wire.client.adapters.bring_to_device(KEY, "/a"))
    await asyncio.sleep(0)
    return bringing


async def test_the_end_of_an_earlier_unload_does_not_disturb_who_brings_the_adapter_back(wire: Wire) -> None:
    wire.client.deliver(LOADED)
    unloading = asyncio.ensure_future(wire.client.adapters.unload(KEY))
    await asyncio.sleep(0)
    bringing = await bringing_begun(wire)
    await unloading  # taken back
    wire.client.deliver(AdapterUnloaded(KEY))  # it had happened when the engine heard of that
    wire.client.deliver(LOADED)
    assert not bringing.done()
    wire.client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    await bringing


@pytest.mark.parametrize("residency", [Residency.DISK, Residency.HOST])
async def test_who_brings_an_adapter_is_told_when_it_is_unloaded_and_who_comes_later_is_not(
    wire: Wire, residency: Residency
) -> None:
    first = await bringing_begun(wire)
    wire.client.deliver(LOADED)
    unload = wire.client.adapters.unload if residency is Residency.DISK else wire.client.adapters.leave_device
    unloading = asyncio.ensure_future(unload(KEY))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = await bringing_begun(wire)
    with pytest.raises(AdapterRejected, match="unloaded meanwhile") as raised:
        await first
    assert raised.value.reason == COLD
    assert [type(message) for message in wire.sent] == [LoadAdapter, UnloadAdapter, LoadAdapter]
    wire.client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    await second
    await unloading


@pytest.mark.parametrize("residency", [Residency.DISK, Residency.HOST])
async def test_an_adapter_that_was_told_to_leave_the_device_does_not_count_as_there(
    wire: Wire, residency: Residency
) -> None:
    wire.client.deliver(LOADED)
    wire.client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    unload = wire.client.adapters.unload if residency is Residency.DISK else wire.client.adapters.leave_device
    unloading = asyncio.ensure_future(unload(KEY))
    await asyncio.sleep(0)
    bringing = await bringing_begun(wire)
    assert wire.sent == [UnloadAdapter(KEY, residency), LoadAdapter(KEY, "/a", Residency.DEVICE)]
    assert not bringing.done()
    wire.client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    await bringing
    await unloading
    await wire.client.adapters.bring_to_device(KEY, "/a")
    assert len(wire.sent) == 2


async def test_a_pin_that_fails_says_whether_there_are_too_many_or_what_is_wrong(wire: Wire) -> None:
    pinning = asyncio.ensure_future(wire.client.adapters.pin(KEY, True))
    await asyncio.sleep(0)
    wire.client.deliver(AdapterPinned(KEY, False, "unpin others"))
    with pytest.raises(AdapterConflict, match="unpin others"):
        await pinning
    pinning = asyncio.ensure_future(wire.client.adapters.pin(KEY, True))
    await asyncio.sleep(0)
    wire.client.deliver(AdapterPinned(KEY, False, "it is too large", TOO_LARGE))
    with pytest.raises(AdapterRejected, match="it is too large") as raised:
        await pinning
    assert raised.value.reason == TOO_LARGE


async def test_a_client_holds_what_the_engine_was_given_while_it_lives(wire: Wire) -> None:
    other = AdapterKey("shared/poet", "cd" * 32)
    both = compose([(KEY, 0.5), (other, 0.5)])
    wire.client.deliver(LOADED)
    assert [wire.client.adapters.holds(key) for key in (None, KEY, other, both)] == [True, True, False, False]
    wire.client.deliver(AdapterLoaded(other, 8, 1024, ["q_proj"], []))
    assert wire.client.adapters.holds(both)
    wire.client.fail(ConnectionError("gone"))
    assert not wire.client.adapters.holds(None)


async def test_a_load_that_nobody_waits_for_may_fail_in_silence(wire: Wire) -> None:
    wire.client.adapters.start_loading(KEY, "/a")
    wire.client.deliver(AdapterFailed(KEY, ["bad"]))
    assert KEY not in wire.client.adapters.loaded


async def test_moves_of_adapters_between_tiers_are_counted() -> None:
    client = EngineClient(lambda message: None)
    client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))  # it is there already
    client.deliver(AdaptersMoved([(KEY, Residency.HOST)]))
    assert client.adapters.moves == {(Residency.DISK, Residency.DEVICE): 1, (Residency.DEVICE, Residency.HOST): 1}


async def test_a_weighted_sum_is_on_the_device_apart_from_its_adapters_and_counts_for_no_tier() -> None:
    client = EngineClient(lambda message: None)
    both = compose([(KEY, 0.5)])
    client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    assert (client.adapters.on_device(KEY), client.adapters.on_device(both)) == (True, False)
    client.deliver(AdaptersMoved([(both, Residency.DEVICE), (KEY, Residency.HOST)]))
    assert (client.adapters.on_device(KEY), client.adapters.on_device(both)) == (False, True)
    assert both not in client.adapters.residency
    client.deliver(AdaptersMoved([(both, Residency.DISK)]))
    assert not client.adapters.on_device(both)


async def test_every_change_of_tier_is_told_once_it_has_happened() -> None:
    client = EngineClient(lambda message: None)
    heard: list[Residency] = []
    client.adapters.moved = lambda key: heard.append(client.adapters.residency.get(key, Residency.DISK))
    client.deliver(LOADED)
    client.deliver(AdaptersMoved([(KEY, Residency.HOST)]))  # it is there already
    client.deliver(AdaptersMoved([(KEY, Residency.DEVICE)]))
    client.deliver(AdapterUnloaded(KEY))
    client.deliver(LOADED)
    client.fail(RuntimeError("gone"))
    assert heard == [Residency.HOST, Residency.DEVICE, Residency.DISK, Residency.HOST, Residency.DISK]
