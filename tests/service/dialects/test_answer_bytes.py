"""Answers that come in one piece are as large as `answer_bytes` lets them be, in whatever words they are asked for."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex_service.dialect_stubs import vllm_engine_pb2
from loraplex_service.dialect_stubs.vllm_engine_pb2_grpc import VllmEngineStub
from loraplex_service.ports.config import DIALECTS, LimitsConfig
from tests.service.control_plane import ControlPlane, control_plane
from tests.service.data_plane import failure


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    limits = LimitsConfig(answer_bytes=200)
    async with control_plane(byte_tokenizer_directory, tmp_path, dialects=DIALECTS, limits=limits) as control:
        yield control


def asked(stream: bool) -> vllm_engine_pb2.GenerateRequest:
    sampling = vllm_engine_pb2.SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    return vllm_engine_pb2.GenerateRequest(text="abc", sampling_params=sampling, stream=stream)


async def test_an_engines_answer_that_is_too_large_for_one_piece_ends_early(channel: Any) -> None:
    metadata = (("loraplex-adapter", "tiny"),)
    stub: Any = VllmEngineStub(channel)
    found = await failure(stub.Generate(asked(stream=False), metadata=metadata).read())
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    *_, last = [response async for response in stub.Generate(asked(stream=True), metadata=metadata)]
    assert last.complete.completion_tokens == 200
