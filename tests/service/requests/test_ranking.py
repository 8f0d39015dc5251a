"""Outputs that are ranked: the best of more that are drawn, and those of a beam search."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from loraplex.v1.generation_pb2 import EARLY_STOPPING_NEVER
from loraplex.v1.inference_pb2 import GenerateRequest, StreamGenerateRequest
from loraplex_engine.link.beams import EarlyStopping
from loraplex_engine.link.grammar import regex_grammar
from loraplex_service.errors import Unavailable
from tests.service.data_plane import DataPlane, failure, make_spec
from tests.service.fake_engine import FakeEngine
from tests.waits import MOST_SECONDS

THREE_TOKENS = {"max_tokens": 3}
SEARCH: dict[str, Any] = {"beam_search": {"num_beams": 2}}


def said(plane: DataPlane, *scripts: str) -> None:
    plane.engine.scripts += [script.encode() for script in scripts]


async def test_the_best_come_back_by_their_mean_log_probability(plane: DataPlane) -> None:
    said(plane, "ccc", "aab", "bbb", "aaa")  # that of a token t is -t / 256
    answer = await plane.generate(make_spec(sampling={"n": 2, "best_of": 4}, stopping=THREE_TOKENS))
    assert [output.text for output in answer.outputs] == ["aaa", "aab"]
    assert [output.finished.output_index for output in answer.outputs] == [0, 1]
    assert answer.outputs[1].finished.score == pytest.approx(-(97 + 97 + 98) / 3 / 256)
    assert answer.usage.completion_tokens == 12
    assert not answer.outputs[0].logprobs


async def test_tokens_behind_a_stop_string_do_not_count_in_the_mean(plane: DataPlane) -> None:
    plane.engine.tokens_per_step = 3
    said(plane, "a.z", "bbb")
    stopping = {"max_tokens": 3, "stop": ["."]}
    answer = await plane.generate(make_spec(sampling={"n": 1, "best_of": 2}, stopping=stopping))
    assert answer.outputs[0].finished.score == pytest.approx(-(97 + 46) / 2 / 256)


async def test_best_of_as_many_as_come_back_is_no_ranking(plane: DataPlane) -> None:
    answer = await plane.generate(make_spec(sampling={"n": 2, "best_of": 2}))
    assert not any(output.finished.HasField("score") for output in answer.outputs)


async def test_a_search_is_one_request_whose_outputs_come_best_first(plane: DataPlane) -> None:
    search = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": EARLY_STOPPING_NEVER}
    plane.models.models["demo"].default_sampling.temperature = 0.7
    spec = make_spec("xyz", sampling={"n": 2}, stopping=THREE_TOKENS, beam_search=search)
    answer = await plane.generate(spec)
    assert [output.text for output in answer.outputs] == ["xyz", "yz"]
    assert [output.finished.score for output in answer.outputs] == [0.0, -1.0]
    assert answer.usage.completion_tokens == 9  # of three beams
    [request] = plane.engine.requests
    assert request.beams is not None
    assert (request.beams.width, request.beams.length_penalty) == (3, 0.5)
    assert request.beams.early_stopping is EarlyStopping.NEVER
    assert (request.sampling.temperature, request.sampling.num_candidates) == (0.0, 6)
    assert not answer.HasField("seed")


async def test_a_search_takes_forms_stop_strings_and_log_probabilities(plane: DataPlane) -> None:
    stopping, output = {"max_tokens": 4, "stop": ["z"]}, {"top_logprobs": 2}
    fields: dict[str, Any] = {"sampling": {"bad_words": ["q"]}, "stopping": stopping, "output": output}
    answer = await plane.generate(make_spec("xyz", constraint={"regex": "[xyz]+"}, **fields, **SEARCH))
    [request] = plane.engine.requests
    assert request.grammar == regex_grammar("[xyz]+")
    assert (request.sampling.bad_words, request.sampling.stop) == (("q",), ("z",))
    assert request.sampling.num_logprobs == 2
    assert (answer.outputs[0].text, answer.outputs[0].finished.stop) == ("xy", "z")


async def test_a_search_that_finds_fewer_outputs_gives_these_alone(plane: DataPlane) -> None:
    plane.engine.most_found = 1
    spec = make_spec("xyz", sampling={"n": 2}, stopping=THREE_TOKENS, **SEARCH)
    answer = await plane.generate(spec)
    assert [output.text for output in answer.outputs] == ["xyz"]


@pytest.fixture
async def next_engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    await engine.close()


async def test_a_search_begins_anew_with_the_next_engine(plane: DataPlane, next_engine: FakeEngine) -> None:
    async def successor(name: str, revision: str) -> Any:
        return next_engine.client

    plane.models.successor = successor  # type: ignore[method-assign]
    plane.engine.steps_allowed = 2
    spec = make_spec("xyz", sampling={"n": 2}, stopping=THREE_TOKENS, **SEARCH)
    running = asyncio.ensure_future(plane.generate(spec))
    await plane.engine.until(lambda: bool(plane.engine.requests) and not plane.engine.steps_allowed)
    plane.engine.client.fail(Unavailable("ENGINE_RESTARTING", "it died"))
    async with asyncio.timeout(MOST_SECONDS):
        answer = await running
    assert [output.text for output in answer.outputs] == ["xyz", "yz"]
    assert answer.usage.completion_tokens == 6
    [request] = next_engine.requests
    assert request.beams is not None
    assert len(request.beams.output_ids) == 2


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"sampling": {"n": 3, "best_of": 2}}, ["sampling.best_of"]),
        ({"beam_search": {"length_penalty": 1}}, ["beam_search.num_beams"]),
        (SEARCH | {"sampling": {"n": 3}}, ["sampling.n"]),
        (SEARCH | {"sampling": {"temperature": 0.5, "top_k": 3}}, ["sampling.temperature", "sampling.top_k"]),
        (SEARCH | {"sampling": {"seed": 3, "best_of": 2}}, ["sampling.seed", "sampling.best_of"]),
        (SEARCH | {"stopping": {"max_tokens": 0}}, ["stopping.max_tokens"]),
        (SEARCH | {"output": {"prompt_logprobs": 0}}, ["output.prompt_logprobs"]),
        (
            SEARCH | {"stopping": {"stop": ["x"]}, "output": {"skip_special_tokens": False}},
            ["output.skip_special_tokens"],
        ),
        (SEARCH | {"watermark": {"key": b"k" * 16}}, ["watermark"]),
        (SEARCH | {"drafts": {"max_draft_tokens": 1}}, ["drafts"]),
        ({"beam_search": {"num_beams": 5}}, ["beam_search.num_beams"]),  # four sequences run at once
    ],
    ids=str,
)
async def test_what_cannot_be_ranked_is_refused_by_name(
    plane: DataPlane, fields: dict[str, Any], at: Sequence[str]
) -> None:
    failed = await failure(plane.stub.Generate(GenerateRequest(spec=make_spec(**fields))))
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert {f"spec.{name}" for name in at} <= set(failed.fields)
    assert not plane.engine.requests


@pytest.mark.parametrize("fields", [SEARCH, {"sampling": {"best_of": 2}}], ids=str)
async def test_a_default_number_of_outputs_is_not_above_that_to_choose_from(
    plane: DataPlane, fields: dict[str, Any]
) -> None:
    plane.models.models["demo"].default_sampling.n = 3
    failed = await failure(plane.stub.Generate(GenerateRequest(spec=make_spec(**fields))))
    assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["spec.model"])
    assert "default sampling whose n is 3, more than" in failed.message
    own = {"n": 1} | fields.get("sampling", {})
    assert len((await plane.generate(make_spec(**(fields | {"sampling": own})))).outputs) == 1


@pytest.mark.parametrize("fields", [SEARCH, {"sampling": {"best_of": 2}}], ids=str)
async def test_what_is_ranked_is_not_streamed(plane: DataPlane, fields: dict[str, Any]) -> None:
    async def first() -> None:
        async for _ in plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(**fields))):
            pass

    failed = await failure(first())
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "nothing can be streamed" in failed.message
