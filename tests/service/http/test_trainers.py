"""What trainers call beside generating: what has nothing to do says so, and what cannot be done says what can."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_service.http.trainers import NEEDLESS, REFUSED
from loraplex_service.text import Tokenizer
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.data_plane import data_plane
from tests.service.http.caller import Caller, caller_of
from tests.waits import MOST_SECONDS

PROCESSED = {"output": {"logprobsMode": "LOGPROBS_MODE_PROCESSED"}}


@pytest.fixture
async def scored(byte_tokenizer: Tokenizer) -> AsyncIterator[Caller]:
    """In front of a data port whose engine knows log-probabilities."""
    async with data_plane(byte_tokenizer) as plane, caller_of(plane.address, "demo") as caller:
        yield caller


@pytest.mark.parametrize("path", NEEDLESS)
async def test_what_has_nothing_to_do_succeeds_and_says_why(caller: Caller, path: str) -> None:
    answer = await caller.request("POST", path, b"", {})
    assert (answer.status, answer.json["success"]) == (200, True)
    assert answer.json["message"] == NEEDLESS[path]


@pytest.mark.parametrize("path", REFUSED)
async def test_a_push_of_weights_is_told_to_publish_an_adapter(caller: Caller, path: str) -> None:
    answer = await caller.post(path, {"weight_dir": "/somewhere"})
    assert (answer.status, answer.error["code"]) == (400, "unsupported_call")
    assert "/v1/load_lora_adapter" in answer.error["message"]


async def test_trls_questions_are_answered(caller: Caller) -> None:
    assert (await caller.get("/get_world_size")).json == {"world_size": 1}
    assert (await caller.get("/is_paused")).json == {"is_paused": False}
    answer = await caller.get("/server_info")
    assert answer.status == 400
    assert "rollout_func" in answer.error["message"]


async def test_an_adapter_is_loaded_by_prime_rls_path_too(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    async with (
        control_plane(byte_tokenizer_directory, tmp_path, models=("tiny",)) as control,
        caller_of(control.addresses.data, admin=control.addresses.admin) as caller,
    ):
        body = {"lora_name": "student", "lora_path": str(write_adapter(tmp_path / "step"))}
        assert (await caller.post("/load_lora_adapter", body)).status == 200
        assert (await caller.chat(model="student")).status == 200


async def test_a_run_of_prime_rl_is_served_and_told_what_it_cannot_do(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    """Its calls, in their order, some without a body, and by its paths beside those below /v1."""
    async with (
        control_plane(byte_tokenizer_directory, tmp_path, models=("tiny",)) as control,
        caller_of(control.addresses.data, admin=control.addresses.admin) as caller,
    ):
        assert (await caller.get("/health")).status == 200
        assert "models/tiny" in {model["id"] for model in (await caller.get("/v1/models")).json["data"]}
        assert (await caller.post("/init_broadcaster", {"host": "a", "port": 1, "rank_offset": 0})).status == 400
        published = set()
        for step in range(2):
            body = {"lora_name": "student", "lora_path": str(write_adapter(tmp_path / f"step-{step}", seed=step))}
            assert (await caller.post("/load_lora_adapter", body)).status == 200
            sampling: dict[str, Any] = {
                "temperature": 1.0,
                "top_p": 1.0,
                "logprobs": True,
                "max_completion_tokens": 4,
                "max_tokens": 4,
            }
            sampling |= {
                "top_k": -1,
                "min_p": 0.0,
                "min_tokens": 0,
                "repetition_penalty": 1.0,
                "return_token_ids": True,
            }
            [choice] = (await caller.chat(model="student", **sampling)).json["choices"]
            published.add(choice["adapter_version"])
        assert len(published) == 2
        assert (await caller.request("POST", "/pause", b"", {})).status == 200
        assert (await caller.post("/update_weights", {"weight_dir": "/somewhere"})).status == 400
        assert (await caller.request("POST", "/resume", b"", {})).status == 200
        assert (await caller.post("/v1/unload_lora_adapter", {"lora_name": "student"})).status == 200


# ---- token ids in and out --------------------------------------------------------------------------------------------


async def test_a_completion_has_the_ids_of_its_prompt_and_of_its_output(scored: Caller) -> None:
    asked = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0, "max_tokens": 3, "n": 2}
    choices = (await scored.complete([[97, 98], "cd"], **asked)).json["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[97, 98]] * 2 + [[99, 100]] * 2
    for choice in choices:
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


async def test_a_chat_has_the_ids_of_its_prompt_at_its_top(scored: Caller) -> None:
    answer = (await scored.chat("hi", return_token_ids=True, return_tokens_as_token_ids=True, logprobs=True)).json
    assert bytes(answer["prompt_token_ids"]).decode().count("hi") == 1
    [choice] = answer["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [
        f"token_id:{token}" for token in choice["token_ids"]
    ]


async def test_a_stream_has_the_ids_of_its_prompt_once(scored: Caller) -> None:
    chats = (await scored.chat("hi", return_token_ids=True, stream=True)).events[:-1]
    assert ["prompt_token_ids" in chunk for chunk in chats] == [True] + [False] * (len(chats) - 1)
    texts = (await scored.complete("ab", return_token_ids=True, stream=True)).events[:-1]
    told = [chunk["choices"][0].get("prompt_token_ids") for chunk in texts]
    assert told == [[97, 98]] + [None] * (len(texts) - 1)


async def test_log_probabilities_may_be_those_that_were_drawn_from(scored: Caller) -> None:
    answer = await scored.complete("ab", logprobs=0, loraplex=PROCESSED)
    assert answer.status == 200
    assert len(answer.json["choices"][0]["logprobs"]["token_logprobs"]) == 4


async def test_every_choice_names_its_adapter_version(control: ControlPlane, caller: Caller) -> None:
    write_adapter(control.roots / "student")
    source = str(control.roots / "student")
    made = await control.admin.create_adapter("student", base_model="tiny", source=source, wait=MOST_SECONDS)
    for answer in (await caller.chat(model="student"), await caller.complete(["a", "b"], model="student")):
        assert {choice["adapter_version"] for choice in answer.json["choices"]} == {made.version}
    for chunks in (await caller.chat(model="student", stream=True)).events[:-1]:
        assert chunks["choices"][0]["adapter_version"] == made.version
    assert "adapter_version" not in (await caller.chat()).json["choices"][0]
