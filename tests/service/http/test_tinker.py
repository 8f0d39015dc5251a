"""Samples by Tinker's REST API: begun, fetched later, bounded, and each its caller's own."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.http.failures import Refusal
from loraplex_service.http.tinker.api import REFUSED
from loraplex_service.http.tinker.futures import Futures, Outcome, Owner
from loraplex_service.http.tinker.messages import _CLASSES, MEDIA_TYPE
from loraplex_service.text import Tokenizer
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import data_plane
from tests.service.http.caller import Answer, Caller, caller_of
from tests.waits import MOST_SECONDS

API = "/api/v1"
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [97, 98]}]}
ME, OTHER = Owner(b"me", ""), Owner(b"other", "")


@pytest.fixture
async def scored(byte_tokenizer: Tokenizer) -> AsyncIterator[Caller]:
    """In front of a data port whose engine knows log-probabilities."""
    async with data_plane(byte_tokenizer) as plane, caller_of(plane.address, "demo") as caller:
        yield caller


async def begin(caller: Caller, headers: dict[str, str] | None = None, **given: Any) -> Answer:
    body = {"base_model": caller.model, "prompt": PROMPT, "sampling_params": {"max_tokens": 3}, "type": "sample"}
    return await caller.post(f"{API}/asample", body | given, headers)


async def fetch(caller: Caller, begun: Answer, headers: dict[str, str] | None = None) -> Answer:
    assert begun.status == 200, begun.body
    return await caller.post(f"{API}/retrieve_future", {"request_id": begun.json["request_id"]}, headers)


def sample(answer: Answer) -> Any:
    assert answer.headers["content-type"] == MEDIA_TYPE, answer.body
    return _CLASSES["SampleResponse"].FromString(answer.body)


def floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


async def test_a_sample_has_tokens_and_log_probabilities_of_prompt_and_output(scored: Caller) -> None:
    asked: dict[str, Any] = {
        "num_samples": 2,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 1,
    }
    begun = await begin(scored, **asked)
    assert len(begun.json["sample_sequence_ids"]) == 2
    found = sample(await fetch(scored, begun))
    for sequence in found.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 4 * 3
        assert (sequence.topk_sampled_logprobs.k, sequence.topk_sampled_logprobs.length) == (1, 3)
        assert all(logprob <= 0 for logprob in floats(sequence.logprobs))
    first, second = floats(found.prompt_logprobs)
    assert first != first  # nothing predicts the first token
    assert second <= 0
    assert (found.topk_prompt_logprobs.k, found.topk_prompt_logprobs.length) == (2, 2)


async def test_only_the_last_tokens_of_a_prompt_may_be_scored(scored: Caller) -> None:
    prompt = {"chunks": [{"tokens": [97, 98]}, {"tokens": [99, 100]}]}
    begun = await begin(scored, prompt=prompt, prompt_logprobs=True, prompt_logprobs_last_n=1)
    *before, last = floats(sample(await fetch(scored, begun)).prompt_logprobs)
    assert [each != each for each in before] == [True] * 3
    assert last <= 0


async def test_a_session_stays_with_the_version_that_its_path_meant(control: ControlPlane, caller: Caller) -> None:
    versions = []
    for seed in (1, 2):
        source = str(write_adapter(control.roots / f"step-{seed}", seed=seed))
        made = await control.admin.create_adapter("student", base_model="tiny", source=source, wait=MOST_SECONDS)
        body = {"session_id": "s", "sampling_session_seq_id": 0, "model_path": "tinker://student"}
        session = (await caller.post(f"{API}/create_sampling_session", body)).json["sampling_session_id"]
        versions.append((made.version, session))
    for version, session in versions:
        told = (await caller.get(f"{API}/samplers/{session}")).json
        assert told == {"sampler_id": session, "base_model": "tiny", "model_path": f"tinker://{version}"}
        begun = await begin(caller, base_model=None, sampling_session_id=session)
        assert len(sample(await fetch(caller, begun)).sequences) == 1


@pytest.mark.parametrize("path", REFUSED)
async def test_training_is_refused_with_what_to_do(caller: Caller, path: str) -> None:
    answer = await caller.post(f"{API}/{path}", {"base_model": "tiny"})
    assert (answer.status, answer.error["code"]) == (400, "unsupported_call")
    assert "publish the adapter" in answer.error["message"]


async def test_what_a_client_asks_before_it_samples_is_answered(caller: Caller) -> None:
    for path in ("client/config", "client/dynamic_config", "create_session", "session_heartbeat", "telemetry"):
        assert (await caller.post(f"{API}/{path}", {})).status == 200
    assert (await caller.post(f"{API}/sessions/session-1/finish", {})).status == 200
    models = (await caller.get(f"{API}/get_server_capabilities")).json["supported_models"]
    assert [(model["model_name"], model["sampleable"]) for model in models] == [("tiny", True)]


async def test_a_sample_that_fails_says_why(caller: Caller) -> None:
    answer = await fetch(caller, await begin(caller, base_model="nobody"))
    assert (answer.status, answer.json["category"]) == (200, "user")
    assert "nobody" in answer.json["error"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": {"chunks": [{"type": "image", "data": "x"}]}}, "prompt.chunks[0]"),
        ({"prompt": {"chunks": [{"tokens": "x"}]}}, "prompt"),
        ({"sampling_params": {"temprature": 1}}, "sampling_params.temprature"),
        ({"sampling_params": {"stop": [1.5]}}, "sampling_params"),
        ({"sampling_session_id": "sampler-%%%"}, "sampling_session_id"),
        ({"prompt_alt_tokens_k": 1}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 0}, "prompt_logprobs_last_n"),
    ],
)
async def test_a_parameter_that_is_wrong_is_named(caller: Caller, given: dict[str, Any], param: str) -> None:
    answer = await begin(caller, **given)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert len(caller.door.samples) == 0


async def test_a_sample_is_fetched_by_its_own_caller_alone(caller: Caller) -> None:
    mine = {"x-api-key": "tml-mine"}
    begun = await begin(caller, mine)
    for others in ({"x-api-key": "tml-others"}, {}, {**mine, "loraplex-tenant": "acme"}):
        assert (await fetch(caller, begun, others)).status == 410
    assert sample(await fetch(caller, begun, mine)).sequences


async def test_a_sample_that_is_cancelled_is_gone(caller: Caller) -> None:
    begun = await begin(caller, sampling_params={"max_tokens": 1_000_000})
    cancelled = await caller.post(f"{API}/cancel_future", {"request_id": begun.json["request_id"]})
    assert cancelled.status == 200
    assert (await fetch(caller, begun)).status == 410
    assert len(caller.door.samples) == 0


async def test_who_may_not_generate_begins_no_sample(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(key,)))
    auth = AuthConfig(keys=str(tmp_path / "keys.yaml"))
    async with (
        control_plane(byte_tokenizer_directory, tmp_path, auth=auth, models=("tiny",)) as control,
        caller_of(control.addresses.data) as caller,
    ):
        for headers in ({}, {"x-api-key": "tml-wrong"}):
            assert (await begin(caller, headers)).status == 401
        assert len(caller.door.samples) == 0
        mine = {"x-api-key": f"tml-{token}"}
        assert sample(await fetch(caller, await begin(caller, mine), mine)).sequences


# ---- bounds ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def bounded(**limits: Any) -> AsyncIterator[Futures]:
    futures = Futures(**{"most_bytes": 1000, **limits})
    try:
        yield futures
    finally:
        await futures.close()


async def done(size: int = 1) -> Outcome:
    return Outcome(200, "text/plain", b"x" * size)


async def never() -> Outcome:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_thousand_samples_that_nobody_fetches_leave_nothing() -> None:
    async with bounded(most=2000, most_bytes=1 << 20, unasked_seconds=0.05) as futures:
        for number in range(1000):
            futures.begin(ME, 10, done if number % 2 else never)
        running = [sample.work for sample in futures._samples.values()]
        async with asyncio.timeout(MOST_SECONDS):
            await asyncio.gather(*running, return_exceptions=True)
            while len(futures):  # noqa: ASYNC110 - they end by the loop's own clock
                await asyncio.sleep(0.01)
        assert (len(futures), futures.num_bytes, futures._counts, futures._bytes) == (0, 0, {}, {})


async def test_one_caller_has_half_of_the_places() -> None:
    async with bounded(most=4) as futures:
        for _ in range(2):
            futures.begin(ME, 1, never)
        with pytest.raises(Refusal) as raised:
            futures.begin(ME, 1, never)
        assert (raised.value.status, raised.value.retry_after) == (429, 1.0)
        futures.begin(OTHER, 1, never)


async def test_a_token_is_one_caller_however_it_is_sent_and_whatever_tenant_it_names(caller: Caller) -> None:
    spellings: list[dict[str, str]] = [
        {"x-api-key": "tml-mine"},
        {"authorization": "Bearer mine"},
        {"authorization": "bEARER mine"},
        {"authorization": "Bearer mine", "x-api-key": "mine"},
        {"authorization": "Bearer mine", "loraplex-tenant": "default"},
    ]
    for headers in spellings:
        assert (await begin(caller, headers)).status == 200
    assert len(caller.door.samples._counts) == 1


async def test_what_was_fetched_makes_room_for_what_comes() -> None:
    async with bounded(most=2) as futures:
        first = futures.begin(ME, 1, done)
        assert await futures.fetch(first, ME, 5.0) == await futures.fetch(first, ME, 5.0)
        second = futures.begin(ME, 1, done)
        with pytest.raises(Refusal):
            await futures.fetch(first, ME, 5.0)
        assert await futures.fetch(second, ME, 5.0)


async def test_an_outcome_that_there_is_no_room_for_has_to_be_asked_for_again() -> None:
    async with bounded() as futures:
        number = futures.begin(ME, 1, partial(done, 501))
        with pytest.raises(Refusal) as raised:
            await futures.fetch(number, ME, 5.0)
        assert raised.value.status == 410
        assert futures.num_bytes == 0


async def test_a_sample_that_is_not_there_yet_is_asked_for_again() -> None:
    async with bounded() as futures:
        assert await futures.fetch(futures.begin(ME, 1, never), ME, 0.01) is None
