"""The adapters of one engine, which the test plays."""

import asyncio

import pytest

from loraplex_adapters.errors import COLD, INVALID, TOO_LARGE, UNREADABLE, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_engine.link.adapters import MAX_REFUSED
from loraplex_engine.link.messages import WantAdapter
from tests.engine.link.conftest import FACTS, KEY, Wire

OTHER = AdapterKey("shared/poet", "cd" * 32)


def dropped(order: int) -> WantAdapter:
    return WantAdapter(KEY, order, least=Residency.DISK, most=Residency.DISK)


async def bringing_begun(wire: Wire) -> "asyncio.Future[None]":
    bringing = asyncio.ensure_future(wire.client.adapters.bring_to_device(KEY, "/a"))
    await asyncio.sleep(0)
    return bringing


async def pinning_begun(wire: Wire, pinned: bool = True) -> "asyncio.Future[None]":
    pinning = asyncio.ensure_future(wire.client.adapters.pin(KEY, pinned))
    await asyncio.sleep(0)
    return pinning


async def unloading_begun(wire: Wire, residency: Residency = Residency.DISK) -> "asyncio.Future[None]":
    unload = wire.client.adapters.unload if residency is Residency.DISK else wire.client.adapters.leave_device
    unloading = asyncio.ensure_future(unload(KEY))
    await asyncio.sleep(0)
    return unloading


async def test_callers_share_one_load(wire: Wire) -> None:
    first = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    second = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    await asyncio.sleep(0)
    assert wire.wishes == [WantAdapter(KEY, 1, "/a")]
    wire.say(1)
    assert await first == await second == FACTS
    assert list(wire.client.adapters.loaded) == [KEY]


async def test_cancelling_one_caller_does_not_disturb_the_load(wire: Wire) -> None:
    first = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    second = asyncio.ensure_future(wire.client.adapters.load(KEY, "/a"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    wire.say(1)
    assert await second == FACTS


async def test_the_engine_hears_once_that_somebody_waits_for_what_it_reads_ahead(wire: Wire) -> None:
    ahead = wire.client.adapters.start_loading(KEY, "/a", ahead=True)
    loading = wire.client.adapters.start_loading(KEY, "/a")
    wire.client.adapters.start_loading(KEY, "/a")
    assert wire.wishes == [WantAdapter(KEY, 1, "/a", ahead=True), WantAdapter(KEY, 2)]
    wire.say(2)
    assert await ahead == await loading == FACTS


async def test_a_wish_is_ahead_no_longer_than_until_it_is_met(wire: Wire) -> None:
    wire.client.adapters.start_loading(KEY, "/a", ahead=True)
    wire.say(1)
    wire.client.adapters.start_bringing(KEY)
    assert [wish.ahead for wish in wire.wishes] == [True, False]


async def test_a_wish_that_is_only_heard_ends_no_load(wire: Wire) -> None:
    loading = wire.client.adapters.start_loading(KEY, "/a")
    wire.say_gone(1)
    assert not loading.done()
    wire.say(1)
    assert await loading == FACTS


async def test_an_adapter_that_fell_out_of_memory_is_loaded_when_it_is_back(wire: Wire) -> None:
    wire.say(0, Residency.DISK)
    loading = wire.client.adapters.start_loading(KEY, "/a")
    wire.say(1, Residency.DISK)
    assert not loading.done()
    wire.say(1)
    assert await loading == FACTS


async def test_a_rejected_adapter_says_why_and_may_be_tried_again(wire: Wire) -> None:
    loading = wire.client.adapters.start_loading(KEY, "/a")
    wire.say(1, Residency.DISK, facts=None, problems=["x: wrong shape", "y: NaN"], reason=INVALID)
    with pytest.raises(AdapterRejected, match="x: wrong shape; y: NaN"):
        await loading
    again = wire.client.adapters.start_loading(KEY, "/b")
    wire.say(2)
    assert await again == FACTS


async def test_the_failure_of_an_older_wish_does_not_end_a_newer_one(wire: Wire) -> None:
    wire.client.adapters.start_bringing(KEY)
    bringing = await bringing_begun(wire)
    wire.say(1, problems=["it was not registered"], reason=COLD)
    await asyncio.sleep(0)
    assert not bringing.done()
    wire.say(2, Residency.DEVICE)
    await bringing


async def test_the_tier_said_for_an_older_wish_does_not_end_a_newer_one(wire: Wire) -> None:
    """The engine had not heard yet that the adapter was to leave the device, and then to come back."""
    wire.say(0, Residency.DEVICE)
    await wire.client.adapters.leave_device(KEY)
    bringing = await bringing_begun(wire)
    wire.say(1, Residency.DEVICE)
    await asyncio.sleep(0)
    assert not bringing.done()
    wire.say(2, Residency.DEVICE)
    await bringing


async def test_unloading_waits_for_the_engine(wire: Wire) -> None:
    wire.say(0)
    unloading = await unloading_begun(wire)
    assert wire.client.adapters.facts(KEY) is None
    assert not unloading.done()
    wire.say_gone(1)
    await unloading


async def test_unloading_waits_while_a_request_uses_the_adapter(wire: Wire) -> None:
    wire.say(0, Residency.DEVICE)
    unloading = await unloading_begun(wire)
    wire.say(1, Residency.DEVICE)
    await asyncio.sleep(0)
    assert not unloading.done()
    wire.say_gone(1)
    await unloading


async def test_unloading_waits_even_if_a_request_meanwhile_finds_the_file_unreadable(wire: Wire) -> None:
    wire.say(0)
    unloading = await unloading_begun(wire)
    wire.say(1, Residency.DISK, problems=["its file is gone"], reason=UNREADABLE)
    await asyncio.sleep(0)
    assert not unloading.done()
    wire.say_gone(1)
    await unloading


async def test_unloading_waits_for_a_load_to_end_first(wire: Wire) -> None:
    """Else those who wait for the load would be told that it came to nothing."""
    loading = wire.client.adapters.start_loading(KEY, "/a")
    unloading = await unloading_begun(wire)
    assert wire.wishes == [WantAdapter(KEY, 1, "/a")]
    wire.say(1)
    await loading
    await asyncio.sleep(0)
    assert wire.wishes == [WantAdapter(KEY, 1, "/a"), dropped(2)]
    assert wire.client.adapters.facts(KEY) is None
    wire.say_gone(2)
    await unloading


async def test_what_is_said_of_an_adapter_before_its_unload_does_not_outlive_it(wire: Wire) -> None:
    wire.say(0)
    unloading = await unloading_begun(wire)
    wire.say(0)
    assert wire.client.adapters.facts(KEY) is None
    wire.say_gone(1)
    await unloading
    assert wire.client.adapters.facts(KEY) is None


async def test_loading_takes_back_an_unload_that_waits(wire: Wire) -> None:
    wire.say(0)
    unloading = await unloading_begun(wire)
    wire.client.adapters.start_loading(KEY, "/a")
    await unloading
    wire.say(2)
    assert wire.client.adapters.facts(KEY) == FACTS
    again = await unloading_begun(wire)
    assert wire.wishes == [dropped(1), WantAdapter(KEY, 2, "/a"), dropped(3)]
    again.cancel()


async def test_the_end_of_an_earlier_unload_does_not_disturb_who_brings_the_adapter_back(wire: Wire) -> None:
    wire.say(0)
    unloading = await unloading_begun(wire)
    bringing = await bringing_begun(wire)
    await unloading  # taken back
    wire.say_gone(1)  # it had happened when the engine heard of that
    wire.say(2)
    assert not bringing.done()
    wire.say(2, Residency.DEVICE)
    await bringing


@pytest.mark.parametrize("residency", [Residency.DISK, Residency.HOST])
async def test_who_brings_an_adapter_is_told_when_it_is_unloaded_and_who_comes_later_is_not(
    wire: Wire, residency: Residency
) -> None:
    first = await bringing_begun(wire)
    wire.say(1)
    unloading = await unloading_begun(wire, residency)
    second = await bringing_begun(wire)
    with pytest.raises(AdapterRejected, match="unloaded meanwhile") as raised:
        await first
    assert raised.value.reason == COLD
    assert [(wish.least, wish.most) for wish in wire.wishes] == [
        (Residency.DEVICE, Residency.DEVICE),
        (Residency.DISK, residency),
        (Residency.DEVICE, Residency.DEVICE),
    ]
    wire.say(3, Residency.DEVICE)
    await second
    await unloading


@pytest.mark.parametrize("residency", [Residency.DISK, Residency.HOST])
async def test_an_adapter_that_was_told_to_leave_the_device_does_not_count_as_there(
    wire: Wire, residency: Residency
) -> None:
    wire.say(0, Residency.DEVICE)
    unloading = await unloading_begun(wire, residency)
    assert not wire.client.adapters.on_device(KEY)
    bringing = await bringing_begun(wire)
    assert wire.wishes == [
        WantAdapter(KEY, 1, least=Residency.DISK, most=residency),
        WantAdapter(KEY, 2, "/a", Residency.DEVICE),
    ]
    assert not bringing.done()
    wire.say(2, Residency.DEVICE)
    await bringing
    await unloading
    await wire.client.adapters.bring_to_device(KEY, "/a")
    assert len(wire.wishes) == 2


async def test_an_adapter_that_is_to_leave_the_device_does_not_take_back_its_unload(wire: Wire) -> None:
    wire.say(0, Residency.DEVICE)
    unloading = await unloading_begun(wire)
    await wire.client.adapters.leave_device(KEY)
    assert wire.wishes[-1].most is Residency.DISK
    assert not unloading.done()
    wire.say_gone(2)
    await unloading


async def test_a_pin_and_an_order_to_bring_an_adapter_become_one_wish(wire: Wire) -> None:
    wire.say(0)
    bringing, pinning = await bringing_begun(wire), await pinning_begun(wire)
    assert wire.wishes[-1] == WantAdapter(KEY, 2, least=Residency.DEVICE, pinned=True)
    wire.say(2, Residency.DEVICE, pinned=True)
    await asyncio.gather(bringing, pinning)


async def test_an_unpin_leaves_what_others_want_as_it_is(wire: Wire) -> None:
    wire.say(0)
    bringing, pinning = await bringing_begun(wire), await pinning_begun(wire)
    unpinning = await pinning_begun(wire, pinned=False)
    assert wire.wishes[-1] == WantAdapter(KEY, 3, least=Residency.DEVICE)
    with pytest.raises(AdapterRejected, match="unpinned meanwhile"):
        await pinning
    wire.say(3)
    await unpinning
    assert not bringing.done()
    wire.say(3, Residency.DEVICE)
    await bringing


async def test_a_load_of_a_pinned_adapter_leaves_it_pinned(wire: Wire) -> None:
    wire.say(0)
    pinning = await pinning_begun(wire)
    wire.say(1, Residency.DEVICE, pinned=True)
    await pinning
    wire.client.adapters.start_loading(KEY, "/a")
    assert wire.wishes[-1] == WantAdapter(KEY, 2, "/a", pinned=True)


async def test_a_wish_that_was_met_is_not_repeated_with_the_next(wire: Wire) -> None:
    """An adapter that made room for others would be brought back else, and nobody asked for that."""
    bringing = await bringing_begun(wire)
    wire.say(1, Residency.DEVICE)
    await bringing
    wire.client.adapters.start_loading(KEY, "/a")
    assert wire.wishes[-1] == WantAdapter(KEY, 2, "/a")


async def test_a_pin_that_fails_says_whether_there_are_too_many_or_what_is_wrong(wire: Wire) -> None:
    wire.say(0)
    pinning = await pinning_begun(wire)
    wire.say(1, Residency.DEVICE, problems=["unpin others"])
    with pytest.raises(AdapterConflict, match="unpin others"):
        await pinning
    pinning = await pinning_begun(wire)
    wire.say(2, problems=["it is too large"], reason=TOO_LARGE)
    with pytest.raises(AdapterRejected, match="it is too large") as raised:
        await pinning
    assert raised.value.reason == TOO_LARGE


async def test_a_pin_too_many_leaves_the_adapter_loaded_and_is_not_asked_for_again(wire: Wire) -> None:
    wire.say(0)
    pinning = await pinning_begun(wire)
    wire.say(1, Residency.DEVICE, problems=["unpin others"])
    await asyncio.gather(pinning, return_exceptions=True)
    assert wire.client.adapters.on_device(KEY)
    wire.client.adapters.start_loading(KEY, "/a")
    assert wire.wishes[-1] == WantAdapter(KEY, 2, "/a")


async def test_a_wait_for_a_pin_ends_when_the_adapter_is_unloaded(wire: Wire) -> None:
    wire.say(0)
    pinning = await pinning_begun(wire)
    await wire.client.adapters.leave_device(KEY)
    with pytest.raises(AdapterRejected, match="unloaded meanwhile"):
        await pinning


async def test_what_could_not_be_brought_is_said_once_and_then_tried_again(wire: Wire) -> None:
    wire.say(0)
    wire.client.adapters.start_bringing(KEY)
    wire.say(1, problems=["it needs 9 bytes"], reason=TOO_LARGE)
    with pytest.raises(AdapterRejected, match="9 bytes"):
        wire.client.adapters.start_bringing(KEY)
    wire.client.adapters.start_bringing(KEY)
    assert [wish.order for wish in wire.wishes] == [1, 2]


async def test_a_read_that_fails_again_and_again_is_said_each_second_time(wire: Wire) -> None:
    """As callers do who have no time to wait: they start a load, and hear at the next call what became of it."""
    wire.client.adapters.start_loading(KEY, "/a")
    wire.say(1, Residency.DISK, facts=None, problems=["no file"], reason=UNREADABLE)
    wire.client.adapters.start_loading(KEY, "/a")
    with pytest.raises(AdapterRejected, match="no file"):
        wire.client.adapters.start_bringing(KEY)


async def test_an_adapter_that_was_to_leave_the_device_is_brought_again_after_a_load(wire: Wire) -> None:
    wire.say(0, Residency.DEVICE)
    await wire.client.adapters.leave_device(KEY)
    wire.say(1, Residency.DEVICE)  # a request still uses it
    wire.client.adapters.start_loading(KEY, "/a")
    bringing = await bringing_begun(wire)
    assert not bringing.done()
    assert wire.wishes[-1].least is Residency.DEVICE
    wire.say(wire.wishes[-1].order, Residency.DEVICE)
    await bringing


async def test_the_newest_refusal_is_kept_however_long_its_adapter_is_known(wire: Wire) -> None:
    wire.say(0)
    for order, number in enumerate(range(MAX_REFUSED), start=1):
        key = compose([(KEY, number / 1000)])
        wire.client.adapters.start_bringing(key)
        wire.say(order, Residency.DISK, key, problems=["no"], reason=TOO_LARGE)
    wire.client.adapters.start_bringing(KEY)
    wire.say(MAX_REFUSED + 1, problems=["it needs 9 bytes"], reason=TOO_LARGE)
    with pytest.raises(AdapterRejected, match="9 bytes"):
        wire.client.adapters.start_bringing(KEY)


async def test_of_weighted_sums_that_could_not_be_brought_only_some_are_kept(wire: Wire) -> None:
    sums = [compose([(KEY, number / 1000)]) for number in range(MAX_REFUSED + 1)]
    for order, key in enumerate(sums, start=1):
        wire.client.adapters.start_bringing(key)
        wire.say(order, Residency.DISK, key, problems=["no"], reason=TOO_LARGE)
    wire.client.adapters.start_bringing(sums[0])
    with pytest.raises(AdapterRejected):
        wire.client.adapters.start_bringing(sums[1])


async def test_a_client_holds_what_the_engine_was_given_while_it_lives(wire: Wire) -> None:
    both = compose([(KEY, 0.5), (OTHER, 0.5)])
    wire.say(0)
    assert [wire.client.adapters.holds(key) for key in (None, KEY, OTHER, both)] == [True, True, False, False]
    wire.say(0, key=OTHER)
    assert wire.client.adapters.holds(both)
    wire.client.fail(ConnectionError("gone"))
    assert not wire.client.adapters.holds(None)


async def test_an_engine_that_is_gone_has_no_adapters_and_no_wish_for_them(wire: Wire) -> None:
    """Its successor gets a client of its own, and is given what the registry says is worth having."""
    wire.say(0, Residency.DEVICE)
    bringing = wire.client.adapters.start_loading(OTHER, "/b")
    wire.client.fail(ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        await bringing
    assert (wire.client.adapters.loaded, wire.client.adapters.residency) == ({}, {})


async def test_a_load_that_nobody_waits_for_may_fail_in_silence(wire: Wire) -> None:
    wire.client.adapters.start_loading(KEY, "/a")
    wire.say(1, Residency.DISK, facts=None, problems=["bad"], reason=INVALID)
    assert wire.client.adapters.facts(KEY) is None


async def test_the_time_of_a_load_is_told_when_it_has_succeeded(wire: Wire) -> None:
    told: list[float] = []
    wire.client.adapters.was_read = told.append
    wire.client.adapters.start_loading(KEY, "/a")
    wire.client.adapters.start_loading(OTHER, "/b")
    wire.say(1)
    wire.say(2, Residency.DISK, OTHER, facts=None, problems=["bad"], reason=INVALID)
    assert len(told) == 1


async def test_moves_of_adapters_between_tiers_are_counted(wire: Wire) -> None:
    wire.say(0, Residency.DEVICE)
    wire.say(0, Residency.DEVICE)  # it is there already
    wire.say(0, Residency.HOST)
    assert wire.client.adapters.moves == {(Residency.DISK, Residency.DEVICE): 1, (Residency.DEVICE, Residency.HOST): 1}


async def test_a_weighted_sum_is_on_the_device_apart_from_its_adapters_and_counts_for_no_tier(wire: Wire) -> None:
    adapters, both = wire.client.adapters, compose([(KEY, 0.5)])
    wire.say(0, Residency.DEVICE)
    assert (adapters.on_device(KEY), adapters.on_device(both)) == (True, False)
    wire.say(0, Residency.DEVICE, both)
    wire.say(0, Residency.HOST)
    assert (adapters.on_device(KEY), adapters.on_device(both)) == (False, True)
    assert both not in adapters.residency
    wire.say(0, Residency.DISK, both)
    assert not adapters.on_device(both)


async def test_every_change_of_tier_is_told_once_it_has_happened(wire: Wire) -> None:
    heard: list[Residency] = []
    wire.client.adapters.moved = lambda key: heard.append(wire.client.adapters.tier(key))
    wire.say(0)
    wire.say(0)  # it is there already
    wire.say(0, Residency.DEVICE)
    wire.say_gone(0)
    wire.say(0)
    wire.client.fail(RuntimeError("gone"))
    assert heard == [Residency.HOST, Residency.DEVICE, Residency.DISK, Residency.HOST, Residency.DISK]
