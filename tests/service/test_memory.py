"""What hostile requests leave of the service's memory: all of it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from loraplex.v1.generation_pb2 import GenerateSpec, Stopping
from loraplex.v1.inference_pb2 import BatchGenerateRequest, GenerateRequest
from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt
from loraplex.v1.tokenizer_pb2 import DetokenizeRequest, TokenizeRequest
from tests.service.watched import Watched, watched_server

ADDRESS_SPACE = 2 << 30
KEPT_BYTES = 64 << 20
RECOVERY_SECONDS = 10.0
RECOVERY_CALLS = (
    1000  # what ten seconds hold where nothing else runs; garbage is collected by what is done, not by time
)
AT_ONCE = 24

LARGE = 2 << 20
TEXT = Prompt(text="\U0001f600" * (LARGE // 4), truncate_to_tokens=1)
CHAT = Prompt(
    chat=Chat(messages=[ChatMessage(role="user", content="\U0001f600" * (LARGE // 4 - 1024))]), truncate_to_tokens=1
)


def generate(prompt: Prompt) -> GenerateRequest:
    return GenerateRequest(spec=spec(prompt))


def spec(prompt: Prompt) -> GenerateSpec:
    return GenerateSpec(model="tiny", prompt=prompt, stopping=Stopping(max_tokens=1))


ORDINARY = generate(Prompt(text="hi"))
HOSTILE: dict[str, tuple[Message, str]] = {
    "texts": (generate(TEXT), "Generate"),
    "chats": (generate(CHAT), "Generate"),
    "texts that are told": (TokenizeRequest(model="tiny", prompt=TEXT, include_text=True), "Tokenize"),
    "tokens": (DetokenizeRequest(model="tiny", token_ids=[97] * (1 << 18)), "Detokenize"),
    "batches": (
        BatchGenerateRequest(specs=[spec(Prompt(text="x" * 16_000, truncate_to_tokens=1))] * 256),
        "BatchGenerate",
    ),
}
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,  # of a text that has, once it is tokenised, more tokens than a prompt may
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_directory: Path) -> Iterator[Watched]:
    roots = tmp_path_factory.mktemp("roots")
    with watched_server(byte_tokenizer_directory, roots, ADDRESS_SPACE) as watched:
        for _ in range(200):
            watched.call(ORDINARY, "Generate")
        watched.call(*HOSTILE["chats"])  # what is loaded with the first long conversation is loaded
        yield watched


@pytest.fixture(scope="module")
def before(watched: Watched) -> int:
    """What the service has before any of it."""
    return watched.memory_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_service_with_little_address_space_bears_many_large_requests_and_gives_back(
    watched: Watched, before: int, name: str
) -> None:
    with ThreadPoolExecutor(AT_ONCE) as callers:
        codes = {code for code, _ in callers.map(lambda _: watched.call(*HOSTILE[name]), range(AT_ONCE))}
    assert codes <= EXPECTED
    assert watched.call(ORDINARY, "Generate") == (grpc.StatusCode.OK, "")
    over, calls = time.monotonic() + RECOVERY_SECONDS, 0
    while (kept := watched.memory_bytes() - before) > KEPT_BYTES:
        assert time.monotonic() < over or calls < RECOVERY_CALLS, kept
        calls += 1
        assert watched.call(ORDINARY, "Generate") == (grpc.StatusCode.OK, "")
