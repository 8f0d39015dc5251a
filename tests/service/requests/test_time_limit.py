"""Outputs that their own time limit ends, wherever they are: in the engine, before an adapter, between two engines."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.v1.inference_pb2 import FINISH_REASON_TIME_LIMIT, GenerateResponse, StreamGenerateRequest
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import RequestOutput, StepOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_service.errors import Unavailable
from loraplex_service.telemetry.config import UsageConfig
from tests.service.control.test_metrics_page import scrape
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import DataPlane, make_spec
from tests.service.telemetry.test_usage import records

LIMIT = {"max_tokens": 5, "time_limit": {"nanos": 10_000_000}}


async def ended_by_the_engine(plane: DataPlane, beginning: dict[str, Any], **fields: Any) -> GenerateResponse:
    """What the caller gets if the engine ends all outputs at the limit, each before its first token."""
    plane.engine.steps_allowed = 0
    response = asyncio.ensure_future(plane.generate(make_spec(**fields)))
    await plane.engine.until(lambda: bool(plane.engine.requests))
    ended = [RequestOutput(each.request_id, [], FinishReason.TIME_LIMIT, **beginning) for each in plane.engine.requests]
    plane.engine.client.deliver(StepOutput(ended, plane.engine._stats()))
    return await response


def assert_ended_with_nothing(response: GenerateResponse, outputs: int = 1) -> None:
    assert [output.finished.reason for output in response.outputs] == [FINISH_REASON_TIME_LIMIT] * outputs
    assert response.usage.completion_tokens == 0
    assert not response.timings.HasField("time_to_first_token")


async def test_an_output_that_ends_before_the_prompts_logprobs_is_a_success(plane: DataPlane) -> None:
    response = await ended_by_the_engine(plane, {}, output={"prompt_logprobs": 0}, sampling={"n": 2})
    assert_ended_with_nothing(response, outputs=2)
    assert not response.prompt_logprobs


async def test_prompt_logprobs_that_were_computed_by_then_are_returned(plane: DataPlane) -> None:
    computed = [None, TokenLogprobs(ord("b"), -0.5, 1, [], [])]
    response = await ended_by_the_engine(plane, {"prompt_logprobs": computed}, output={"prompt_logprobs": 0})
    assert_ended_with_nothing(response)
    assert [entry.text for entry in response.prompt_logprobs] == ["a", "b"]


async def test_a_request_that_never_ran_was_in_the_queue_all_the_time(plane: DataPlane) -> None:
    timings = (await ended_by_the_engine(plane, {"queue_seconds": None})).timings
    assert 0 < timings.queue_duration.ToNanoseconds() <= timings.total_duration.ToNanoseconds()


async def test_the_limit_runs_while_an_adapter_is_read(plane: DataPlane) -> None:
    plane.engine.loads_allowed = False
    version = plane.add_adapter()
    response = await plane.generate(make_spec(model="pirate", stopping=LIMIT, sampling={"n": 2}))
    assert_ended_with_nothing(response, outputs=2)
    assert response.target.adapter_version == version.version_name
    assert not plane.engine.requests


async def test_what_the_wait_for_an_adapter_took_is_no_longer_left(plane: DataPlane) -> None:
    plane.engine.loads_allowed = False
    plane.add_adapter()
    stopping = {"max_tokens": 5, "time_limit": {"seconds": 3000}}
    waiting = asyncio.ensure_future(plane.generate(make_spec(model="pirate", stopping=stopping)))
    await plane.engine.until(lambda: not plane.admission.idle)
    plane.engine.allow_loads()
    await waiting
    left = plane.engine.requests[0].sampling.time_limit_seconds
    assert left is not None
    assert left < 3000


async def test_the_limit_runs_while_there_is_no_engine(plane: DataPlane) -> None:
    never = asyncio.Event()

    async def successor(name: str, revision: str) -> EngineClient:
        await never.wait()
        raise AssertionError

    plane.models.successor = successor  # type: ignore[method-assign]
    plane.engine.steps_allowed = 2
    text, reasons = "", []
    async for event in plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec("abcdef", stopping=LIMIT))):
        text += event.delta.text
        if event.HasField("finished"):
            reasons.append(event.finished.reason)
        if text == "ab":
            plane.engine.client.fail(Unavailable("ENGINE_RESTARTING", "it died"))
    assert (text, reasons) == ("ab", [FINISH_REASON_TIME_LIMIT])


# ---- what is told of one that had no token ---------------------------------------------------------------------------


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    settings: dict[str, Any] = {
        "usage": UsageConfig(file=str(tmp_path / "usage.jsonl")),
        "metrics_listen": "127.0.0.1:0",
    }
    async with control_plane(byte_tokenizer_directory, tmp_path, **settings) as control:
        source = str(write_adapter(tmp_path / "pirate"))
        control.core().loads_allowed.clear()
        await control.admin.create_adapter("pirate", base_model="tiny", source=source)
        yield control
        control.core().loads_allowed.set()


async def test_its_usage_record_has_neither_a_first_step_nor_a_first_token(control: ControlPlane) -> None:
    await control.client.generate("pirate", "abc", time_limit=0.01)
    [record] = records(control.roots / "usage.jsonl")
    assert (record["finish_reasons"], record["completion_tokens"]) == (["TIME_LIMIT"], 0)
    assert (record["queue_seconds"], record["first_token_seconds"]) == (None, None)
    assert record["adapter_load_seconds"] > 0


async def test_it_counts_in_no_histogram_of_first_tokens(control: ControlPlane) -> None:
    await control.client.generate("pirate", "abc", time_limit=0.01)
    page = await scrape(control)
    assert page.value("loraplex_request_duration_seconds_count", model="tiny") == 1
    for name in ("loraplex_time_to_first_token_seconds", "loraplex_queue_seconds"):
        assert page.values(f"{name}_count") == []
