"""Score: how likely candidates are behind a prompt, by an engine whose probabilities can be worked out by hand."""

import asyncio
from typing import Any

import grpc
import pytest

from loraplex.v1.generation_pb2 import OutputOptions
from loraplex.v1.inference_pb2 import Candidate, ScoreRequest, ScoreResponse, TokenLogprob
from loraplex.v1.prompt_pb2 import Prompt, TokenIds
from loraplex_engine.link.messages import TokenLogprobs
from loraplex_service.admission.tenants import TenantConfig, Tenants
from loraplex_service.ports.interceptors import CallLimits
from loraplex_service.requests import scores
from loraplex_service.requests.outputs import token_logprob
from loraplex_service.requests.scores import LOGPROBS_AT_ONCE, CandidateScores
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure

IDS = Candidate(token_ids=TokenIds(ids=[7, 9]))


def asked(text: str = "abc", **fields: Any) -> ScoreRequest:
    spec = {"model": "demo", "prompt": Prompt(text=text)} | fields.pop("spec", {})
    return ScoreRequest(**({"spec": spec, "candidates": [Candidate(text="xy"), IDS]} | fields))


async def scored(plane: DataPlane, request: ScoreRequest) -> ScoreResponse:
    response: ScoreResponse = await plane.stub.Score(request)
    return response


async def test_each_candidate_has_the_sum_of_its_tokens(plane: DataPlane) -> None:
    answer = await scored(plane, asked())
    assert [each.logprob for each in answer.scores] == [-(ord("x") + ord("y")) / 256, -16 / 256]
    assert [each.num_tokens for each in answer.scores] == [2, 2]
    assert not answer.scores[0].token_logprobs
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 + 4, 0)
    assert answer.request_id
    assert answer.target.model == "models/demo"


async def test_tokens_come_back_where_they_are_asked_for(plane: DataPlane) -> None:
    output = {"top_logprobs": 2, "logprob_token_ids": [4]}
    answer = await scored(plane, asked(spec={"output": output, "labels": {"team": "a"}}))
    tokens = answer.scores[1].token_logprobs
    assert [(token.token_id, token.logprob) for token in tokens] == [(7, -7 / 256), (9, -9 / 256)]
    assert [len(token.top) for token in tokens] == [2, 2]
    assert [list(token.named_logprobs) for token in tokens] == [[-4 / 256]] * 2
    assert answer.labels == {"team": "a"}


async def test_the_engine_reads_the_prompt_before_each_candidate_and_draws_nothing(plane: DataPlane) -> None:
    version = plane.add_adapter("default/pirate")
    await scored(plane, asked(spec={"model": "pirate"}))
    assert [request.prompt_token_ids[-3:] for request in plane.engine.requests] == [[99, 120, 121], [99, 7, 9]]
    for request in plane.engine.requests:
        assert request.adapter == version.key
        assert (request.sampling.max_tokens, request.sampling.prompt_logprobs_from) == (0, 3)


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"candidates": []}, "candidates"),
        ({"candidates": [Candidate()]}, "candidates[0]"),
        ({"candidates": [Candidate(token_ids=TokenIds())]}, "candidates[0].token_ids"),
        ({"candidates": [Candidate(text="x" * 126)]}, "candidates[0].text"),
        ({"candidates": [IDS, Candidate(token_ids=TokenIds(ids=[1] * 126))]}, "candidates[1].token_ids"),
        ({"candidates": [Candidate(token_ids=TokenIds(ids=[258]))]}, "candidates[0].token_ids"),
        ({"spec": {"sampling": {"n": 1}}}, "spec.sampling"),
        ({"spec": {"stopping": {"max_tokens": 0}}}, "spec.stopping"),
        ({"spec": {"constraint": {"json_object": {}}}}, "spec.constraint"),
        ({"spec": {"stream": {}}}, "spec.stream"),
        ({"spec": {"output": {"prompt_logprobs": 1}}}, "spec.output.prompt_logprobs"),
        ({"spec": {"output": {"logprobs_mode": 1}}}, "spec.output.logprobs_mode"),
        ({"spec": {"model": ""}}, "spec.model"),
    ],
    ids=str,
)
async def test_what_cannot_be_scored_is_refused_by_name(plane: DataPlane, fields: dict[str, Any], at: str) -> None:
    failed = await failure(plane.stub.Score(asked(**fields)))
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert at in failed.fields
    assert not plane.engine.requests


async def test_a_score_counts_against_the_quota_by_its_tokens(byte_tokenizer: Tokenizer) -> None:
    tenants = Tenants({"default": TenantConfig(tokens_per_second=1, burst_seconds=10)})
    async with data_plane(byte_tokenizer, tenants=tenants) as plane:
        await scored(plane, asked())  # 7 of 10
        failed = await failure(plane.stub.Score(asked()))
    assert failed.reason == "TENANT_QUOTA"


async def test_an_answer_that_is_certain_to_be_too_large_is_refused_before_it_is_computed(
    byte_tokenizer: Tokenizer,
) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=300)) as plane:
        for output in ({"top_logprobs": 20}, {"logprob_token_ids": range(20)}):
            failed = await failure(plane.stub.Score(asked(spec={"output": output})))
            assert (failed.reason, plane.engine.requests) == ("MESSAGE_TOO_LARGE", [])
        await scored(plane, asked(spec={"output": {"top_logprobs": 1, "logprob_token_ids": [4]}}))


async def test_an_answer_that_turns_out_too_large_ends_the_candidates_that_are_still_read(
    byte_tokenizer: Tokenizer,
) -> None:
    candidates = [IDS, Candidate(token_ids=TokenIds(ids=[7] * 20))] + [IDS] * 9
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=100)) as plane:
        failed = await failure(plane.stub.Score(asked(candidates=candidates, spec={"output": {"logprobs": True}})))
        assert failed.reason == "MESSAGE_TOO_LARGE"
        await plane.engine.until_idle()
        assert plane.admission.idle


async def test_others_are_served_after_so_many_logprobs_of_an_answer(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = most = 0

    def counted(entry: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprob:
        nonlocal made
        made += 1 + len(entry.top_ids)
        return token_logprob(entry, tokenizer)

    async def others() -> None:
        nonlocal made, most
        while True:
            most, made = max(most, made), 0
            await asyncio.sleep(0)

    monkeypatch.setattr(scores, "token_logprob", counted)
    serving = asyncio.create_task(others())
    entry = TokenLogprobs(token_id=97, logprob=-1.0, rank=1, top_ids=[97] * 20, top_logprobs=[-1.0] * 20)
    await CandidateScores(1, OutputOptions(top_logprobs=20), 1 << 20).add(0, [entry] * 500, byte_tokenizer)
    serving.cancel()
    assert LOGPROBS_AT_ONCE / 2 < most <= LOGPROBS_AT_ONCE
