"""A request whose engine dies goes on with the next one, as if nothing had happened."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.messages import AddRequest
from loraplex import FailedPrecondition, LoraplexError, Unavailable
from service.errors import Cancelled
from tests.service.control_plane import ControlPlane, control_plane, write_adapter

LENGTH = 400  # tokens, of a millisecond each: still running when its engine dies


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(byte_tokenizer_directory, tmp_path) as control:
        yield control


def engine_lives(control: ControlPlane) -> int:
    return len(control.engines["tiny"].started)


def kill_engine(control: ControlPlane) -> None:
    control.engines["tiny"].started[-1].kill()


async def until(control: ControlPlane, lives: int) -> None:
    async with asyncio.timeout(20):
        while engine_lives(control) < lives or not await control.client.is_serving("models/tiny"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def running(control: ControlPlane, count: int) -> list[AddRequest]:
    """What the present engine runs, once there are so many."""
    async with asyncio.timeout(20):
        while len(control.core().requests) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return list(control.core().requests.values())


async def test_every_token_comes_once_over_three_lives_of_the_engine(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "abc", max_tokens=3 * LENGTH)
    events = [await anext(stream)]
    for lives in (1, 2):
        kill_engine(control)
        await until(control, lives + 1)
        events.append(await anext(stream))
    result = await stream.collect()
    assert result.outputs[0].text == "abc" * LENGTH
    assert result.usage.completion_tokens == 3 * LENGTH
    assert engine_lives(control) == 3


async def test_what_a_request_is_left_with_is_all_that_the_next_engine_is_asked_for(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "ab", max_tokens=LENGTH, n=2, seed=7)
    first, second = await running(control, 2)
    kill_engine(control)
    await until(control, 2)
    requests = await running(control, 2)
    assert [request.sampling.seed for request in requests] == [first.sampling.seed, second.sampling.seed]
    for request in requests:
        assert request.prompt_token_ids == first.prompt_token_ids
        assert request.output_token_ids == (list(b"ab") * LENGTH)[: len(request.output_token_ids)]
        assert request.sampling.max_tokens == LENGTH
    assert [output.text for output in (await stream.collect()).outputs] == ["ab" * (LENGTH // 2)] * 2


async def test_the_next_engine_gets_the_requests_adapter_before_the_request(control: ControlPlane) -> None:
    await control.admin.create_adapter(
        "pirate", base_model="tiny", source=str(write_adapter(control.roots / "pirate")), wait=20
    )
    stream = control.client.stream_generate("pirate", "ab", max_tokens=LENGTH)
    await anext(stream)
    [request] = await running(control, 1)
    kill_engine(control)
    await until(control, 2)
    assert (await stream.collect()).outputs[0].text == "ab" * (LENGTH // 2)
    assert request.adapter in control.core().loaded


async def test_a_request_that_its_engines_die_of_is_given_up(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "ab", max_tokens=1 << 18)
    await anext(stream)
    for lives in (1, 2):
        kill_engine(control)
        await until(control, lives + 1)
    await running(control, 1)
    kill_engine(control)
    with pytest.raises(Unavailable) as raised:
        await stream.collect()
    assert raised.value.reason == "ENGINE_RESTARTING"


async def test_a_request_can_be_cancelled_while_it_waits_for_the_next_engine(control: ControlPlane) -> None:
    stream = control.client.stream_generate("tiny", "ab", max_tokens=1 << 18)
    await anext(stream)
    stuck = asyncio.Event()
    launch = control.app.host.get("tiny").supervisor._launch

    async def later(address: str) -> object:
        await stuck.wait()
        return await launch(address)

    control.app.host.get("tiny").supervisor._launch = later  # type: ignore[assignment]
    kill_engine(control)
    async with asyncio.timeout(20):
        while control.app.host.get("tiny").client is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    control.app.inference.end_all(Cancelled("enough"))
    with pytest.raises(LoraplexError, match="enough"):
        await stream.collect()
    stuck.set()


async def test_a_request_ends_when_its_model_cannot_be_loaded_again(control: ControlPlane) -> None:
    def fail(core: object) -> None:
        raise OSError("no memory is left")

    stream = control.client.stream_generate("tiny", "ab", max_tokens=1 << 18)
    await anext(stream)
    control.engines["tiny"].prepare = fail
    kill_engine(control)
    with pytest.raises(FailedPrecondition) as raised:
        await stream.collect()
    assert raised.value.reason == "MODEL_UNLOADED"
