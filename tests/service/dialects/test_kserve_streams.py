"""KServe's streams of requests, which may stay open for as long as their callers like."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from loraplex.v1.inference_pb2 import FinishReason, GenerateOutput, GenerateResponse, TokenLogprob, TopLogprob
from loraplex_service.admission.places import UnreadAnswers
from loraplex_service.admission.tenants import Tenants
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import Key, KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.call import Call, serving
from loraplex_service.dialect_stubs.kserve_v2_pb2 import ModelInferRequest, ModelStreamInferResponse
from loraplex_service.dialect_stubs.kserve_v2_pb2_grpc import GRPCInferenceServiceStub
from loraplex_service.dialects.backend import Backend
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.kserve.servicer import AT_ONCE, SLOT_BYTES, KServeServicer
from loraplex_service.errors import SlowConsumer
from loraplex_service.ports.config import DIALECTS
from tests.service.control_plane import ControlPlane, control_plane
from tests.service.data_plane import failure
from tests.service.dialects.test_kserve import infer


@pytest.fixture
def key() -> tuple[str, Key]:
    return make_key("acme", [Role.INFERENCE], None)


@pytest.fixture
async def guarded(byte_tokenizer_directory: Path, tmp_path: Path, key: tuple[str, Key]) -> AsyncIterator[ControlPlane]:
    """A server that knows one key."""
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(key[1],)))
    auth = AuthConfig(keys=str(tmp_path / "keys.yaml"))
    async with control_plane(byte_tokenizer_directory, tmp_path, dialects=DIALECTS, auth=auth) as control:
        yield control


@pytest.mark.parametrize("left", [[], [Role.ADAPTERS], [Role.INFERENCE, Role.ADMIN]], ids=["none", "another", "more"])
async def test_a_stream_ends_once_its_credentials_are_taken_back(
    guarded: ControlPlane, tmp_path: Path, key: tuple[str, Key], left: list[Role]
) -> None:
    token, known = key
    async with grpc.aio.insecure_channel(guarded.addresses.data) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        stream = stub.ModelStreamInfer(metadata=(("authorization", f"Bearer {token}"),))
        await stream.write(infer())
        assert not (await stream.read()).error_message
        keys = (msgspec.structs.replace(known, roles=tuple(left)),) if left else ()
        write_keys(tmp_path / "keys.yaml", KeyFile(keys=keys))
        await stream.write(infer())
        found = await failure(stream.read())
    assert found.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class EndlessBackend:
    """Lets every generation in, and ends none."""

    def __init__(self) -> None:
        self.tenants = Tenants()
        self.running = 0

    async def whole(self, draft: Draft, context: object) -> GenerateResponse:
        self.running += 1
        await asyncio.Event().wait()
        raise AssertionError


async def forever(request: ModelInferRequest) -> AsyncIterator[ModelInferRequest]:
    while True:
        yield request


@pytest.mark.parametrize(("characters", "most"), [(10, AT_ONCE), (SLOT_BYTES, AT_ONCE // 2), (AT_ONCE * SLOT_BYTES, 1)])
async def test_a_stream_holds_no_more_bytes_than_one_request_may_have(characters: int, most: int) -> None:
    backend: Any = EndlessBackend()
    context: Any = None
    with serving(Call("acme")):
        responses = KServeServicer(backend).ModelStreamInfer(forever(infer("x" * characters)), context)
        first = asyncio.ensure_future(anext(responses))
        for _ in range(100):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert backend.running == most


class WordyBackend:
    """Answers with many log-probabilities, and counts the turns of the loop from then on."""

    def __init__(self, answer_bytes: int = 32 << 20, unread_bytes: int = 256 << 20) -> None:
        self.turns = 0
        self.tenants = Tenants()
        self.answer_bytes = answer_bytes
        self.unread = UnreadAnswers(unread_bytes)

    def check_answer(self, size: int) -> None:
        backend: Any = self
        Backend.check_answer(backend, size)

    async def whole(self, draft: Draft, context: object) -> GenerateResponse:
        top = [TopLogprob(token_id=token, logprob=-1.0, text="x") for token in range(20)]
        output = GenerateOutput(logprobs=[TokenLogprob(token_id=1, logprob=-1.0, top=top)] * 4000)
        output.finished.reason = FinishReason.FINISH_REASON_MAX_TOKENS
        self.counting = asyncio.create_task(self._count())
        return GenerateResponse(outputs=[output])

    async def _count(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)


async def test_others_get_their_turns_while_a_long_answer_is_written() -> None:
    backend: Any = WordyBackend()
    context: Any = None
    await KServeServicer(backend).ModelInfer(infer(return_logprobs=True), context)
    backend.counting.cancel()
    assert backend.turns > 5


async def one(request: ModelInferRequest) -> AsyncIterator[ModelInferRequest]:
    yield request


@pytest.fixture
def wordy() -> Any:
    return WordyBackend(answer_bytes=100 << 20, unread_bytes=1)


@pytest.fixture
async def responses(wordy: Any) -> AsyncIterator[AsyncIterator[ModelStreamInferResponse]]:
    """Those to one request of a stream, whose answer is large."""
    context: Any = None
    with serving(Call("acme")):
        requests = one(infer(return_logprobs=True))
        async with aclosing(KServeServicer(wordy).ModelStreamInfer(requests, context)) as responses:
            yield responses
    wordy.counting.cancel()


async def test_an_answer_in_a_stream_is_no_larger_than_that_of_a_unary_call(wordy: Any, responses: Any) -> None:
    wordy.answer_bytes = 100_000
    assert "[MESSAGE_TOO_LARGE]" in (await anext(responses)).error_message


async def test_a_large_answer_of_a_stream_counts_as_unread_until_it_is_written(wordy: Any, responses: Any) -> None:
    assert not (await anext(responses)).error_message
    with pytest.raises(SlowConsumer):
        wordy.unread.send("acme", 1)
    assert await anext(responses, None) is None
    wordy.unread.send("acme", 1)


async def test_who_does_not_read_large_answers_gets_no_more_of_them(wordy: Any, responses: Any) -> None:
    wordy.unread.send("acme", 1)
    assert "[SLOW_CONSUMER]" in (await anext(responses)).error_message
