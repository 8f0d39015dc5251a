"""However a call of whatever method ends, and wherever its requests are by then: nothing of it stays behind."""

import asyncio
import itertools
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from loraplex.v1.generation_pb2 import GenerateSpec, Stopping
from loraplex.v1.inference_pb2 import BatchGenerateRequest, GenerateRequest, StreamGenerateRequest
from loraplex.v1.inference_pb2_grpc import InferenceServiceStub
from loraplex.v1.prompt_pb2 import Prompt, TokenIds
from loraplex_engine.link.messages import EngineStats
from tests.e2e.conftest import END_SECONDS
from tests.faults import caller
from tests.faults.serving import MODEL, Serving, serving

ROUNDS = int(os.environ.get("LORAPLEX_DISCONNECT_ROUNDS", "1"))  # of each combination
SEQUENCES: Final = {"unary": 1, "stream": 1, "batch": 2}  # of one call
PLACES = 2  # that run at once; a step computes as many tokens, so that a long prompt takes hundreds of steps
DEADLINE_SECONDS = 0.3
TRIES = 5  # to reach a state before the deadline, which doubles each time

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROMPTS = itertools.count()  # no two prompts are equal, so that none is found in the prefix cache


class State(NamedTuple):
    """Where the requests of a call are when it ends, and how they get there."""

    target: str
    others: tuple[str, ...]  # what runs beside it all the time
    prompt_tokens: int
    reached: Callable[[EngineStats, EngineStats, int], bool]  # figures before and now, sequences of the call


STATES: Final = {
    "queued": State(MODEL, (MODEL,) * PLACES, 8, lambda before, now, count: now.num_waiting == count),
    "waiting for adapter": State(
        "poet", ("pirate",), 8, lambda before, now, count: now.num_waiting_for_adapter == count
    ),
    "prefill": State(
        MODEL,
        (),
        1900,
        lambda before, now, count: (
            now.prompt_tokens > before.prompt_tokens and now.generated_tokens == before.generated_tokens
        ),
    ),
    "decode": State(MODEL, (), 8, lambda before, now, count: now.generated_tokens > before.generated_tokens + count),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Serving]:
    """With room for one adapter on the device."""
    async with serving(max_num_seqs=PLACES, max_num_batched_tokens=PLACES, max_resident_adapters=1) as server:
        yield server


@pytest.fixture(scope="module")
def callers() -> ForkServerContext:
    """Makes processes that can call at once: what they need is imported before they fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([caller.__name__])
    return context


def new_spec(target: str, prompt_tokens: int) -> GenerateSpec:
    number = next(PROMPTS)
    ids = [100 + number % 1000, 100 + number // 1000, *[7] * (prompt_tokens - 2)]
    prompt = Prompt(token_ids=TokenIds(ids=ids))
    return GenerateSpec(
        model=target, prompt=prompt, stopping=Stopping(max_tokens=2040 - prompt_tokens, ignore_eos=True)
    )


def start(
    channel: grpc.aio.Channel, method: str, spec: GenerateSpec, timeout: float | None = None
) -> "asyncio.Task[Any]":
    stub = InferenceServiceStub(channel)

    async def read(stream: Any) -> None:
        async for _ in stream:
            pass

    async def unary() -> None:
        await stub.Generate(GenerateRequest(spec=spec), timeout=timeout)

    if method == "unary":
        return asyncio.create_task(unary())
    if method == "stream":
        return asyncio.create_task(read(stub.StreamGenerate(StreamGenerateRequest(spec=spec), timeout=timeout)))
    return asyncio.create_task(read(stub.BatchGenerate(BatchGenerateRequest(specs=[spec, spec]), timeout=timeout)))


async def end(task: "asyncio.Task[Any]") -> grpc.StatusCode | None:
    """Cancel a call if it still runs. Returns its status, None for one that was cancelled here."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        try:
            await task
        except grpc.aio.AioRpcError as error:
            return error.code()
    return None


async def disconnect(server: Serving, callers: ForkServerContext, method: str, how: str, state: State) -> None:
    """One call that reaches the state and ends so; returns once none of its requests is there."""
    if how == "kill":
        await kill(server, callers, method, state)
    elif how == "deadline":
        await outlive_deadline(server, method, state)
    else:
        before = await server.stats()
        async with grpc.aio.insecure_channel(server.addresses.data) as channel:
            call = start(channel, method, new_spec(state.target, state.prompt_tokens))
            await server.until(lambda now: state.reached(before, now, SEQUENCES[method]))
            if how == "close":
                await channel.close()
                await asyncio.wait({call})
            await end(call)
    await until_left(server, state)


async def kill(server: Serving, callers: ForkServerContext, method: str, state: State) -> None:
    before = await server.stats()
    spec = new_spec(state.target, state.prompt_tokens).SerializeToString()
    process = callers.Process(target=caller.call, args=(server.addresses.data, method, spec))
    await asyncio.to_thread(process.start)
    await server.until(lambda now: state.reached(before, now, SEQUENCES[method]))
    process.kill()
    await asyncio.to_thread(process.join)
    assert process.exitcode == -signal.SIGKILL


async def outlive_deadline(server: Serving, method: str, state: State) -> None:
    """A call whose deadline comes in the state: on a slow machine later."""
    async with grpc.aio.insecure_channel(server.addresses.data) as channel:
        for attempt in range(TRIES):
            before = await server.stats()
            spec = new_spec(state.target, state.prompt_tokens)
            call = start(channel, method, spec, DEADLINE_SECONDS * 2.0**attempt)
            was_reached = False
            while not was_reached and not call.done():
                was_reached = state.reached(before, await server.stats(), SEQUENCES[method])
            await asyncio.wait({call})
            status = await end(call)
            if was_reached:
                assert status is grpc.StatusCode.DEADLINE_EXCEEDED
                return
            await until_left(server, state)
    raise AssertionError(f"no call got so far in {DEADLINE_SECONDS * 2.0 ** (TRIES - 1):g} s")


async def until_left(server: Serving, state: State) -> None:
    """Until the service has told the engine to forget the call's requests."""
    client = server.app.host.get(MODEL).client
    assert client is not None
    async with asyncio.timeout(END_SECONDS):
        while client.requests.num_unfinished > len(state.others):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["cancel", "deadline", "close", "kill"])
@pytest.mark.parametrize("method", SEQUENCES)
async def test_nothing_of_a_call_stays_behind(
    server: Serving, callers: ForkServerContext, method: str, how: str, state: str
) -> None:
    for _ in range(ROUNDS):
        await play_round(server, callers, method, how, STATES[state])


async def play_round(server: Serving, callers: ForkServerContext, method: str, how: str, state: State) -> None:
    """While others run, what they have is all that is in use; without them nothing is."""
    num_others = len(state.others)
    async with grpc.aio.insecure_channel(server.addresses.data) as channel:
        others = [start(channel, "stream", new_spec(target, 8)) for target in state.others]
        await server.until(lambda now: now.num_running == num_others)
        await disconnect(server, callers, method, how, state)
        now = await server.stats()
        assert (now.num_running, now.num_waiting, now.num_waiting_for_adapter) == (num_others, 0, 0)
        assert sum(count for _, count in now.adapters) == state.others.count("pirate")
        for other in others:
            await end(other)
        await server.until_nothing_is_held()
