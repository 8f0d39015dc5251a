"""The requests of one engine, which the test plays."""

import asyncio

import pytest

from loraplex_engine.link.messages import AddRequest, RequestOutput, TokenLogprobs
from loraplex_engine.link.requests import Generation, SlowConsumerError
from loraplex_engine.link.sampling_params import FinishReason
from tests.engine.link.conftest import Wire


def tokens(request: AddRequest, *token_ids: int, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request.request_id, list(token_ids), finish)


async def read_all(generation: Generation) -> list[list[int]]:
    return [output.token_ids async for output in generation]


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
