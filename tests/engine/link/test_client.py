"""The client of one engine, fed by hand."""

import asyncio

import pytest

from loraplex_adapters.errors import COLD, TOO_LARGE, AdapterConflict, AdapterRejected
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import (
    Abort,
    AdapterFailed,
    AdapterLoaded,
    AdapterPinned,
    AdaptersMoved,
    AdapterUnloaded,
    AddRequest,
    EngineStats,
    LoadAdapter,
    Ping,
    Pong,
    RequestOutput,
    StepOutput,
    ToEngine,
    TokenLogprobs,
    UnloadAdapter,
)
from loraplex_engine.link.requests import Generation, SlowConsumerError
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams

KEY = AdapterKey("shared/pirate", "ab" * 32)
LOADED = AdapterLoaded(KEY, 8, 1024, ["q_proj"], [])
STATS = EngineStats(0, 0, 0, 8, 8, 0, 16, 1, 0, 0, 0, 0, 0, 0, 0)


class Wire:
    """A client, and what it sent."""

    def __init__(self, max_pending_tokens: int = 100) -> None:
        self.sent: list[ToEngine] = []
        self.client = EngineClient(self.sent.append, max_pending_tokens=max_pending_tokens)

    def request(self) -> AddRequest:
        return AddRequest(self.client.requests.new_id(), [1, 2], SamplingParams(seed=0, max_tokens=10))

    def step(self, *outputs: RequestOutput) -> None:
        self.client.deliver(StepOutput(list(outputs), STATS))

    @property
    def aborted(self) -> list[list[int]]:
        return [message.request_ids for message in self.sent if isinstance(message, Abort)]


@pytest.fixture
async def wire() -> Wire:
    return Wire()


def tokens(request: AddRequest, *token_ids: int, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request.request_id, list(token_ids), finish)


async def read_all(generation: Generation) -> list[list[int]]:
    return [output.token_ids async for output in generation]


# ---- generate --------------------------------------------------------------------------------------------------------


async def test_outputs_come_until_the_last(wire: Wire) -> None:
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        wire.step(tokens(request, 5))
        assert (await anext(outputs)).token_ids == [5]
        wire.step(tokens(request, 6, finish=FinishReason.EOS))
        assert (await anext(outputs)).finish_reason is FinishReason.EOS
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)
    assert wire.sent == [request]
    assert wire.client.requests.num_unfinished == 0


async def test_what_comes_while_the_reader_is_busy_is_merged(wire: Wire) -> None:
    request = wire.request()
    entry = TokenLogprobs(5, -1.0, 1, [], [])
    with wire.client.requests.generate(request) as outputs:
        wire.step(RequestOutput(1, [5], logprobs=[entry], prompt_logprobs=[None, entry], num_cached_tokens=1))
        wire.step(RequestOutput(1, [6], logprobs=[entry]))
        wire.step(RequestOutput(1, [7], FinishReason.STOP, 7, logprobs=[entry]))
        merged = await anext(outputs)
    assert merged.token_ids == [5, 6, 7]
    assert merged.logprobs == [entry] * 3
    assert merged.prompt_logprobs == [None, entry]
    assert (merged.num_cached_tokens, merged.finish_reason, merged.stop_token_id) == (1, FinishReason.STOP, 7)


async def test_sequences_take_turns(wire: Wire) -> None:
    first, second = wire.request(), wire.request()
    with wire.client.requests.generate(first, second) as outputs:
        wire.step(tokens(first, 1), tokens(second, 2))
        assert (await anext(outputs)).request_id == first.request_id
        wire.step(tokens(first, 3))
        assert (await anext(outputs)).request_id == second.request_id
        assert (await anext(outputs)).token_ids == [3]


async def test_other_callers_outputs_are_not_mixed_in(wire: Wire) -> None:
    mine, other = wire.request(), wire.request()
    with wire.client.requests.generate(mine) as my_outputs, wire.client.requests.generate(other) as other_outputs:
        wire.step(tokens(other, 2, finish=FinishReason.EOS), tokens(mine, 1, finish=FinishReason.EOS))
        assert await read_all(my_outputs) == [[1]]
        assert await read_all(other_outputs) == [[2]]


async def test_leaving_early_aborts_what_runs(wire: Wire) -> None:
    first, second = wire.request(), wire.request()
    with wire.client.requests.generate(first, second):
        wire.step(tokens(first, 1, finish=FinishReason.EOS))
    assert wire.aborted == [[second.request_id]]


async def test_leaving_after_the_end_aborts_nothing(wire: Wire) -> None:
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        wire.step(tokens(request, 1, finish=FinishReason.EOS))
        await read_all(outputs)
    assert wire.aborted == []


async def test_cancelling_a_wait_loses_nothing(wire: Wire) -> None:
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(outputs)
        wire.step(tokens(request, 1, finish=FinishReason.EOS))
        assert await read_all(outputs) == [[1]]


async def test_outputs_of_an_aborted_request_are_dropped(wire: Wire) -> None:
    request = wire.request()
    with wire.client.requests.generate(request):
        pass
    wire.step(tokens(request, 1))
    assert wire.client.requests.num_unfinished == 0


async def test_aborting_one_sequence_leaves_the_others(wire: Wire) -> None:
    first, second = wire.request(), wire.request()
    with wire.client.requests.generate(first, second) as outputs:
        wire.step(tokens(first, 1), tokens(second, 2))
        outputs.abort(first.request_id)
        wire.step(tokens(second, 3, finish=FinishReason.EOS))
        assert await read_all(outputs) == [[2, 3]]
    assert wire.aborted == [[first.request_id]]


async def test_a_reader_too_far_behind_is_cut() -> None:
    wire = Wire(max_pending_tokens=3)
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        wire.step(tokens(request, 1, 2, 3))
        assert wire.aborted == []
        wire.step(tokens(request, 4))
        assert wire.aborted == [[request.request_id]]
        with pytest.raises(SlowConsumerError, match="4 tokens"):
            await anext(outputs)
    assert wire.aborted == [[request.request_id]]


async def test_a_reader_that_keeps_up_is_never_cut() -> None:
    wire = Wire(max_pending_tokens=3)
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        for token_id in range(10):
            wire.step(tokens(request, token_id))
            assert (await anext(outputs)).token_ids == [token_id]


async def test_end_stops_the_engine_and_reaches_the_reader(wire: Wire) -> None:
    request = wire.request()
    with wire.client.requests.generate(request) as outputs:
        waiting = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        outputs.end(ValueError("enough"))
        with pytest.raises(ValueError, match="enough"):
            await waiting
    assert wire.aborted == [[request.request_id]]


def test_stats_are_those_of_the_last_step() -> None:
    wire = Wire()
    wire.step()
    assert wire.client.stats == STATS


# ---- adapters --------------------------------------------------------------------------------------------------------


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


# ---- liveness and death ----------------------------------------------------------------------------------------------


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
