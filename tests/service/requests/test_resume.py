"""A request whose engine dies goes on with the next one, as if nothing had happened."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
from grpc import StatusCode as Code

from loraplex import FailedPrecondition, LoraplexError, Unavailable
from loraplex.v1.inference_pb2 import Candidate, GenerateResponse, ScoreRequest, ScoreResponse
from loraplex_adapters.errors import UNREADABLE
from loraplex_adapters.residency import Residency
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import AddRequest, ToEngine, WantAdapter
from loraplex_service.errors import Cancelled
from loraplex_service.errors import Unavailable as EngineGone
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import DataPlane, failure, make_spec
from tests.service.fake_engine import FakeEngine
from tests.service.scripted_engine import ScriptedCore
from tests.waits import MOST_SECONDS

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
    async with asyncio.timeout(MOST_SECONDS):
        while engine_lives(control) < lives or not await control.client.is_serving("models/tiny"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def running(control: ControlPlane, count: int) -> list[AddRequest]:
    """What the present engine runs, once there are so many."""
    async with asyncio.timeout(MOST_SECONDS):
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
        "pirate", base_model="tiny", source=str(write_adapter(control.roots / "pirate")), wait=MOST_SECONDS
    )
    stream = control.client.stream_generate("pirate", "ab", max_tokens=LENGTH)
    await anext(stream)
    [request] = await running(control, 1)
    kill_engine(control)
    await until(control, 2)
    assert (await stream.collect()).outputs[0].text == "ab" * (LENGTH // 2)
    assert request.adapter in control.core().loaded


async def test_prompts_to_embed_that_an_engine_had_not_computed_are_sent_to_the_next(control: ControlPlane) -> None:
    source = str(write_adapter(control.roots / "pirate"))
    await control.admin.create_adapter("pirate", base_model="tiny", source=source, wait=MOST_SECONDS)
    control.core().pools = False
    call = asyncio.ensure_future(control.client.embed("pirate", [[number] for number in range(11)]))
    held = await running(control, 4)
    kill_engine(control)
    await until(control, 2)
    response = await call
    assert [list(embedding.values) for embedding in response.embeddings] == [[number] for number in range(11)]
    assert response.report.usage.prompt_tokens == 11
    assert held[0].adapter in control.core().loaded


async def test_a_request_to_embed_that_its_engines_die_of_is_given_up(control: ControlPlane) -> None:
    def hold(core: ScriptedCore) -> None:
        core.pools = False

    control.engines["tiny"].prepare = hold
    control.core().pools = False
    call = asyncio.ensure_future(control.client.embed("tiny", "ab"))
    for lives in (1, 2, 3):
        await running(control, 1)
        kill_engine(control)
        if lives < 3:
            await until(control, lives + 1)
    with pytest.raises(Unavailable) as raised:
        await call
    assert raised.value.reason == "ENGINE_RESTARTING"


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
    async with asyncio.timeout(MOST_SECONDS):
        while control.app.host.get("tiny").client is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    control.app.entrance.end_all(Cancelled("enough"))
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


# ---- by hand: what may happen between the steps of going on ----------------------------------------------------------


class Lives:
    """A model whose engine dies, and the engines that follow it, each asked for when a request wants to go on."""

    def __init__(self, plane: DataPlane, *successors: FakeEngine) -> None:
        self.successors = list(successors)
        self._plane = plane
        plane.models.successor = self.successor  # type: ignore[method-assign]

    async def successor(self, name: str, revision: str) -> EngineClient:
        if len(self.successors) > 1:
            return self.successors.pop(0).client
        return self.successors[0].client

    def end(self) -> None:
        self._plane.engine.client.fail(EngineGone("ENGINE_RESTARTING", "it died"))


@pytest.fixture
async def next_engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    await engine.close()


async def begun(plane: DataPlane, model: str) -> "asyncio.Task[GenerateResponse]":
    """A request that runs and has got one token of five."""
    plane.engine.steps_allowed = 1
    running = asyncio.create_task(plane.generate(make_spec(model=model)))
    await plane.engine.until(lambda: bool(plane.engine.requests) and not plane.engine.steps_allowed)
    return running


def wishes(messages: list[ToEngine]) -> list[WantAdapter]:
    return [message for message in messages if isinstance(message, WantAdapter)]


def has_been_told_to_read(engine: FakeEngine, path: str) -> bool:
    return any(wish.path == path for wish in wishes(engine.received))


async def test_a_request_whose_adapter_is_unloaded_while_it_goes_on_loads_it_again(
    plane: DataPlane, next_engine: FakeEngine
) -> None:
    key = plane.add_adapter().key
    lives = Lives(plane, next_engine)
    running = await begun(plane, "pirate")
    next_engine.loads_allowed = False
    lives.end()
    await next_engine.until(lambda: bool(next_engine.received))
    unloading = asyncio.create_task(next_engine.client.adapters.unload(key))
    await asyncio.sleep(0)
    next_engine.allow_loads()
    assert (await running).usage.completion_tokens == 5
    await unloading
    [request] = next_engine.requests
    before = wishes(next_engine.received[: next_engine.received.index(request)])
    assert [wish.most for wish in before] == [Residency.DEVICE, Residency.DISK, Residency.DEVICE]


async def answer(call: Awaitable[ScoreResponse]) -> ScoreResponse:
    return await call


async def test_candidates_are_scored_by_the_next_engine(plane: DataPlane, next_engine: FakeEngine) -> None:
    lives = Lives(plane, next_engine)
    plane.engine.steps_allowed = 0
    spec = make_spec()
    spec.ClearField("stopping")
    request = ScoreRequest(spec=spec, candidates=[Candidate(text="x"), Candidate(text="y")])
    running = asyncio.ensure_future(answer(plane.stub.Score(request)))
    await plane.engine.until(lambda: len(plane.engine.requests) == 2)
    lives.end()
    assert [score.logprob for score in (await running).scores] == [-ord("x") / 256, -ord("y") / 256]


async def test_a_member_of_a_sum_that_is_unloaded_while_another_loads_is_loaded_again(
    plane: DataPlane, next_engine: FakeEngine
) -> None:
    first, second = plane.add_adapter("default/a", "ab" * 32), plane.add_adapter("default/b", "cd" * 32)
    lives = Lives(plane, next_engine)
    running = await begun(plane, "a*0.5 + b*0.5")
    next_engine.loads_allowed = False
    lives.end()
    await next_engine.until(lambda: bool(next_engine.received))
    next_engine.allow_loads()
    next_engine.loads_allowed = False
    await next_engine.until(lambda: has_been_told_to_read(next_engine, second.spec.source))
    await next_engine.client.adapters.unload(first.key)
    next_engine.allow_loads()
    assert (await running).usage.completion_tokens == 5
    assert set(next_engine.adapters) == {first.key, second.key}


async def test_a_request_whose_adapter_the_next_engine_cannot_read_ends_with_what_is_wrong(
    plane: DataPlane, next_engine: FakeEngine
) -> None:
    version = plane.add_adapter()
    lives = Lives(plane, next_engine)
    running = await begun(plane, "pirate")
    next_engine.loads_allowed = False
    lives.end()
    await next_engine.until(lambda: bool(next_engine.received))
    [wish] = wishes(next_engine.received)
    next_engine.say(version.key, wish.order, ["its file is gone"], UNREADABLE)
    failed = await failure(running)
    assert (failed.code, failed.reason) == (Code.UNAVAILABLE, UNREADABLE)
    assert f"adapter {version.version_name} cannot be served: its file is gone" in failed.message


async def test_a_request_whose_next_engine_dies_at_once_goes_on_with_the_one_after(
    plane: DataPlane, next_engine: FakeEngine
) -> None:
    dying = FakeEngine()
    lives = Lives(plane, dying, next_engine)
    running = await begun(plane, "demo")

    async def die_when_asked_for(name: str, revision: str) -> EngineClient:
        client = await lives.successor(name, revision)
        if client is dying.client:
            asyncio.get_running_loop().call_soon(client.fail, EngineGone("ENGINE_RESTARTING", "it died as well"))
        return client

    plane.models.successor = die_when_asked_for  # type: ignore[method-assign]
    lives.end()
    assert (await running).usage.completion_tokens == 5
    await dying.close()


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("ADAPTER_COLD", Code.UNAVAILABLE),
        ("ADAPTER_UNREADABLE", Code.UNAVAILABLE),
        ("ADAPTER_TOO_LARGE", Code.FAILED_PRECONDITION),
        ("ADAPTER_INVALID", Code.FAILED_PRECONDITION),
    ],
)
async def test_an_adapter_that_the_engine_cannot_bring_back_is_said_to_be_what_is_wrong(
    plane: DataPlane, reason: str, code: Code
) -> None:
    version = plane.add_adapter()
    plane.engine.errors.append("it cannot be had")
    plane.engine.error_reason = reason
    failed = await failure(plane.generate(make_spec(model="pirate")))
    assert (failed.code, failed.reason) == (code, reason)
    assert version.version_name in failed.message
    assert "it cannot be had" in failed.message
