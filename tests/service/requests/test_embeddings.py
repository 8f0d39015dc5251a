"""Embeddings as callers ask for them: one vector for each prompt, under the rules of every request."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import msgspec
import pytest
from grpc import StatusCode as Code

from loraplex.v1.generation_pb2 import ON_COLD_FAIL, ON_COLD_USE_BASE, AdapterPolicy, CacheOptions
from loraplex.v1.inference_pb2 import CancelGenerationRequest
from loraplex.v1.pooling_pb2 import POOLING_LAST, POOLING_MEAN, EmbedRequest, EmbedResponse, RunOptions
from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt, TokenIds
from loraplex_adapters.errors import COLD
from loraplex_engine.link.pooling import ModelPooling, PoolingMethod, PoolingParams
from loraplex_service.admission.tenants import TenantConfig, Tenants
from loraplex_service.errors import Unavailable
from loraplex_service.ports.interceptors import CallLimits
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec


def request(*texts: str, **fields: Any) -> EmbedRequest:
    prompts = [Prompt(text=text) for text in texts or ("abc",)]
    return EmbedRequest(**({"model": "demo", "prompts": prompts} | fields))


def state(plane: DataPlane, **fields: Any) -> None:
    """Have the checkpoint say how it embeds."""
    limits = msgspec.structs.replace(plane.engine.limits, pooling=ModelPooling(**fields))
    plane.models.models["demo"] = replace(plane.models.models["demo"], limits=limits)


def vectors(response: EmbedResponse) -> list[list[float]]:
    return [list(embedding.values) for embedding in response.embeddings]


async def test_each_prompt_has_its_vector_in_order(plane: DataPlane) -> None:
    texts = [chr(97 + index) * (1 + index % 3) for index in range(9)]
    response = await plane.pooling.Embed(request(*texts))
    assert vectors(response) == [list(text.encode()) for text in texts]
    assert [embedding.prompt_tokens for embedding in response.embeddings] == [len(text) for text in texts]


async def test_the_report_says_what_ran_and_what_it_took(plane: DataPlane) -> None:
    plane.engine.cached_tokens = 2
    version = plane.add_adapter()
    options = RunOptions(client_request_id="mine", labels={"team": "search"})
    call = plane.pooling.Embed(request("abc", "de", model="pirate", options=options))
    report = (await call).report
    metadata = dict(await call.initial_metadata())
    assert report.request_id == metadata["loraplex-request-id"]
    assert metadata["loraplex-adapter-version"] == report.target.adapter_version == version.version_name
    assert (report.usage.prompt_tokens, report.usage.cached_prompt_tokens, report.usage.completion_tokens) == (5, 4, 0)
    assert (report.client_request_id, dict(report.labels)) == ("mine", {"team": "search"})
    assert report.timings.queue_duration.ToSeconds() == 0
    assert report.timings.queue_duration.nanos > 0
    assert report.timings.HasField("total_duration")
    assert not report.timings.HasField("time_to_first_token")


async def test_the_engine_gets_what_generations_get_and_no_sampling(plane: DataPlane) -> None:
    version = plane.add_adapter()
    options = RunOptions(priority=-3, cache=CacheOptions(salt="s", bypass_prefix_cache=True))
    await plane.pooling.Embed(request(model="pirate", options=options))
    await plane.generate(make_spec(model="pirate", priority=-3, cache={"salt": "s"}))
    embedded, generated = plane.engine.requests
    assert embedded.adapter == generated.adapter == version.key
    assert (embedded.cache_salt, embedded.priority, embedded.tenant) == (generated.cache_salt, 3, generated.tenant)
    assert embedded.bypass_prefix_cache
    assert embedded.sampling.max_tokens == 0


@pytest.mark.parametrize(
    ("stated", "fields", "params"),
    [
        ({}, {}, PoolingParams(normalize=True)),
        (
            {"method": PoolingMethod.MEAN, "normalize": False},
            {},
            PoolingParams(method=PoolingMethod.MEAN, normalize=False),
        ),
        ({"method": PoolingMethod.MEAN}, {"pooling": POOLING_LAST}, PoolingParams(normalize=True)),
        ({}, {"pooling": POOLING_MEAN, "normalize": False}, PoolingParams(method=PoolingMethod.MEAN)),
        ({"normalize": False}, {"normalize": True, "dimensions": 4}, PoolingParams(normalize=True, dimensions=4)),
        (
            {"problem": "it has a dense layer"},
            {"pooling": POOLING_MEAN},
            PoolingParams(method=PoolingMethod.MEAN, normalize=True),
        ),
    ],
)
async def test_what_the_request_leaves_out_is_as_the_checkpoint_says(
    plane: DataPlane, stated: dict[str, Any], fields: dict[str, Any], params: PoolingParams
) -> None:
    state(plane, **stated)
    await plane.pooling.Embed(request(**fields))
    assert [asked.pooling for asked in plane.engine.requests] == [params]


async def test_a_way_of_the_checkpoint_that_cannot_be_followed_is_refused_by_name(plane: DataPlane) -> None:
    state(plane, problem="modules.json has the module Dense")
    failed = await failure(plane.pooling.Embed(request()))
    assert (failed.code, failed.reason, failed.fields) == (Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED", ["pooling"])
    assert "modules.json has the module Dense" in failed.message


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({"model": ""}, "model"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [Prompt(text="a")] * 257}, "prompts"),
        ({"prompts": [Prompt(text="a"), Prompt()]}, "prompts[1]"),
        ({"prompts": [Prompt(token_ids=TokenIds(ids=[1, 300]))]}, "prompts[0].token_ids.ids"),
        ({"prompts": [Prompt(text="a" * 129)]}, "prompts[0]"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 17}, "dimensions"),
        ({"pooling": 3}, "pooling"),
        ({"options": RunOptions(priority=101)}, "options.priority"),
    ],
)
async def test_a_field_at_fault_is_named(plane: DataPlane, fields: dict[str, Any], at_fault: str) -> None:
    failed = await failure(plane.pooling.Embed(request(**fields)))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, [at_fault])
    assert plane.engine.requests == []


async def test_a_prompt_may_fill_the_context_and_may_be_a_conversation(plane: DataPlane) -> None:
    chat = Prompt(chat=Chat(messages=[ChatMessage(role="user", content="hi")], add_generation_prompt=False))
    response = await plane.pooling.Embed(request(prompts=[Prompt(text="a" * 128), chat]))
    assert vectors(response) == [[97.0] * 128, list(b"[user]hi")]


async def test_the_engine_has_no_more_prompts_of_a_call_than_can_run(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = asyncio.ensure_future(plane.pooling.Embed(request(*("a" * (1 + index) for index in range(11)))))
    sizes = []
    for _ in range(3):
        await plane.engine.until(lambda: bool(plane.engine.sequences))
        sizes.append(len(plane.engine.sequences))
        plane.engine.step()
    assert sizes == [4, 4, 3]
    assert len((await call).embeddings) == 11


async def test_a_caller_that_leaves_takes_its_prompts_along(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = plane.pooling.Embed(request("a", "b"))
    await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
    call.cancel()
    await plane.engine.until_idle()
    assert plane.admission.idle


async def test_it_ends_by_its_id_with_what_the_engine_was_sent(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = asyncio.ensure_future(
        failure(plane.pooling.Embed(request(*"abcdefghi", options=RunOptions(client_request_id="mine"))))
    )
    await plane.engine.until(lambda: len(plane.engine.sequences) == 4)
    plane.engine.step()
    await plane.engine.until(lambda: len(plane.engine.requests) == 8)
    await plane.stub.CancelGeneration(CancelGenerationRequest(client_request_ids=["mine"]))
    failed = await call
    assert (failed.code, failed.partial_usage.prompt_tokens) == (Code.CANCELLED, 8)
    await plane.engine.until_idle()


async def test_a_deadline_ends_it(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await plane.pooling.Embed(request(), timeout=0.2)
    assert raised.value.code() is Code.DEADLINE_EXCEEDED
    await plane.engine.until_idle()


async def test_one_that_the_engine_cannot_compute_fails_the_call(plane: DataPlane) -> None:
    plane.engine.errors = ["its logits are not finite numbers"]
    failed = await failure(plane.pooling.Embed(request("a", "b")))
    plane.errors.records.clear()
    assert (failed.code, failed.reason) == (Code.INTERNAL, "ENGINE_ERROR")
    assert "its logits are not finite numbers" in failed.message
    await plane.engine.until_idle()


async def test_a_cold_adapter_is_waited_for_or_not_as_asked(plane: DataPlane) -> None:
    plane.add_adapter()
    fails, without = (
        RunOptions(adapter_policy=AdapterPolicy(on_cold=policy)) for policy in (ON_COLD_FAIL, ON_COLD_USE_BASE)
    )
    plane.engine.loads_allowed = False
    failed = await failure(plane.pooling.Embed(request(model="pirate", options=fails)))
    assert (failed.code, failed.reason) == (Code.UNAVAILABLE, COLD)
    response = await plane.pooling.Embed(request(model="pirate", options=without))
    assert response.report.target.fell_back_to_base
    call = asyncio.ensure_future(plane.pooling.Embed(request(model="pirate")))
    await asyncio.sleep(0)
    plane.engine.allow_loads()
    assert (await call).report.target.adapter_version


async def test_an_answer_that_is_too_large_is_refused_before_it_is_computed(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, limits=CallLimits(answer_bytes=100)) as plane:
        failed = await failure(plane.pooling.Embed(request("a", "b")))
        assert (failed.reason, plane.engine.requests) == ("MESSAGE_TOO_LARGE", [])
        await plane.pooling.Embed(request("a", "b", dimensions=12))


@pytest.fixture
async def metered(byte_tokenizer: Tokenizer) -> AsyncIterator[DataPlane]:
    tenants = Tenants(others=TenantConfig(tokens_per_second=1.0, burst_seconds=8))
    async with data_plane(byte_tokenizer, tenants=tenants) as plane:
        yield plane


async def test_all_prompts_count_against_the_quota(metered: DataPlane) -> None:
    await metered.pooling.Embed(request("abc", "def"))
    failed = await failure(metered.pooling.Embed(request("abc")))
    assert (failed.code, failed.reason) == (Code.RESOURCE_EXHAUSTED, "TENANT_QUOTA")


async def test_what_is_ended_before_it_is_computed_counts_against_the_quota(metered: DataPlane) -> None:
    metered.engine.steps_allowed = 0
    options = RunOptions(client_request_id="mine")
    call = asyncio.ensure_future(failure(metered.pooling.Embed(request("abc", "def", options=options))))
    await metered.engine.until(lambda: len(metered.engine.sequences) == 2)
    await metered.stub.CancelGeneration(CancelGenerationRequest(client_request_ids=["mine"]))
    await call
    metered.engine.allow_steps(1)
    failed = await failure(metered.pooling.Embed(request("abc")))
    assert failed.reason == "TENANT_QUOTA"


async def test_when_the_server_drains_it_ends_with_all_others(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 0
    call = asyncio.ensure_future(failure(plane.pooling.Embed(request())))
    await plane.engine.until(lambda: bool(plane.engine.sequences))
    plane.entrance.end_all(Unavailable("DRAINING", "soon"))
    assert (await call).reason == "DRAINING"
