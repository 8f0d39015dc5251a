"""The stream of one generation: its events, their order, what is in them. The fake engine says the prompt back."""

import math
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex.v1 import generation_pb2, inference_pb2
from loraplex.v1.inference_pb2 import GenerateRequest, StreamGenerateRequest
from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_engine.link.watermark import Watermark
from tests.service.data_plane import EOS, DataPlane, make_spec, text_of


async def test_a_stream_is_started_then_deltas_then_finished_then_completed(plane: DataPlane) -> None:
    events = await plane.stream(make_spec())
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert set(kinds[1:-2]) == {"delta"}
    assert kinds[-2:] == ["finished", "completed"]
    assert [event.seq for event in events] == list(range(len(events)))


async def test_text_is_the_deltas_joined(plane: DataPlane) -> None:
    assert text_of(await plane.stream(make_spec("abc", stopping={"max_tokens": 7}))) == "abcabca"


async def test_started_says_what_runs(plane: DataPlane) -> None:
    plane.engine.cached_tokens = 2
    started = (await plane.stream(make_spec()))[0].started
    assert started.target.model == "models/demo"
    assert started.target.model_revision == "r1"
    assert started.target.adapter_version == ""
    assert (started.prompt_tokens, started.cached_prompt_tokens) == (3, 2)
    assert started.queue_duration.ToMilliseconds() >= 250  # what the engine reports, and the way there
    assert not started.HasField("adapter_load_duration")


async def test_completed_says_what_it_cost(plane: DataPlane) -> None:
    plane.engine.cached_tokens = 2
    completed = (await plane.stream(make_spec()))[-1].completed
    usage = completed.usage
    assert (usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens) == (3, 2, 5)
    assert completed.timings.total_duration.ToNanoseconds() >= completed.timings.time_to_first_token.ToNanoseconds() > 0


async def test_unary_is_the_stream_folded(plane: DataPlane) -> None:
    plane.engine.cached_tokens = 1
    call = plane.stub.Generate(GenerateRequest(spec=make_spec(output={"token_ids": True})))
    response = await call
    [output] = response.outputs
    assert output.text == "abcab"
    assert list(output.token_ids) == list(b"abcab")
    assert output.finished.reason == inference_pb2.FINISH_REASON_MAX_TOKENS
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 5)
    assert response.target.model == "models/demo"
    assert dict(await call.trailing_metadata())["loraplex-request-id"] == response.request_id


async def test_tokens_that_are_ready_together_are_one_delta(plane: DataPlane) -> None:
    plane.engine.tokens_per_step = 5
    events = await plane.stream(make_spec())
    assert [event.delta.text for event in events if event.HasField("delta")] == ["abcab"]


async def test_min_tokens_per_chunk_holds_tokens_back(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 3
    stream_options = {"min_tokens_per_chunk": 3, "max_chunk_delay": {"seconds": 10}}
    made = make_spec(stopping={"max_tokens": 8}, stream=stream_options)
    texts = []
    async for event in plane.stub.StreamGenerate(StreamGenerateRequest(spec=made)):
        if event.HasField("delta"):
            texts.append(event.delta.text)
            plane.engine.allow_steps(3)
    assert texts == ["abc", "abc", "ab"]


async def test_max_chunk_delay_lets_held_tokens_go(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 2
    made = make_spec(stream={"min_tokens_per_chunk": 100, "max_chunk_delay": {"nanos": 1_000_000}})
    call = plane.stub.StreamGenerate(StreamGenerateRequest(spec=made))
    texts = ""
    async for event in call:
        texts += event.delta.text
        if texts == "ab":
            plane.engine.allow_steps(100)
    assert texts == "abcab"


async def test_characters_are_never_split(plane: DataPlane) -> None:
    plane.engine.scripts.append("é€😀".encode())
    plane.engine.steps_allowed = 1
    text = ""
    async for event in plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(stopping={"max_tokens": 9}))):
        text += event.delta.text
        plane.engine.allow_steps(3)
    assert text == "é€😀"


async def test_bytes_that_never_become_a_character_come_out_at_the_end(plane: DataPlane) -> None:
    plane.engine.scripts.append([0xE2, 0x82])
    assert text_of(await plane.stream(make_spec(stopping={"max_tokens": 2}))) == "�"


@pytest.mark.parametrize(
    ("output", "text", "token_ids"),
    [
        ({}, "abcab", []),
        ({"token_ids": True}, "abcab", list(b"abcab")),
        ({"text": False}, "", list(b"abcab")),
        ({"text": False, "token_ids": False}, "", []),
    ],
)
async def test_the_caller_chooses_text_and_token_ids(
    plane: DataPlane, output: dict[str, bool], text: str, token_ids: list[int]
) -> None:
    events = await plane.stream(make_spec(output=output))
    assert text_of(events) == text
    assert [token_id for event in events for token_id in event.delta.token_ids] == token_ids


# ---- how an output ends ----------------------------------------------------------------------------------------------


async def test_eos_ends_the_output_and_is_not_shown(plane: DataPlane) -> None:
    plane.engine.scripts.append([*b"hi", EOS])
    events = await plane.stream(make_spec(output={"token_ids": True, "skip_special_tokens": False}))
    finished = events[-2].finished
    assert (text_of(events), finished.reason) == ("hi", inference_pb2.FINISH_REASON_EOS)
    assert finished.completion_tokens == 3
    assert EOS not in [token_id for event in events for token_id in event.delta.token_ids]


async def test_include_stop_shows_eos(plane: DataPlane) -> None:
    plane.engine.scripts.append([*b"hi", EOS])
    made = make_spec(stopping={"max_tokens": 5, "include_stop": True}, output={"skip_special_tokens": False})
    assert text_of(await plane.stream(made)) == "hi<eos>"


async def test_ignore_eos_goes_on(plane: DataPlane) -> None:
    plane.engine.scripts.append([*b"hi", EOS])
    events = await plane.stream(make_spec(stopping={"max_tokens": 5, "ignore_eos": True}))
    assert (text_of(events), events[-2].finished.reason) == ("hihi", inference_pb2.FINISH_REASON_MAX_TOKENS)


async def test_stop_token_is_named(plane: DataPlane) -> None:
    events = await plane.stream(make_spec("abc", stopping={"max_tokens": 9, "stop_token_ids": [ord("c"), ord("z")]}))
    finished = events[-2].finished
    assert (text_of(events), finished.reason) == ("ab", inference_pb2.FINISH_REASON_STOP)
    assert finished.stop_token_id == ord("c")


@pytest.mark.parametrize("tokens_per_step", [1, 2, 7])
async def test_stop_string_across_tokens_ends_the_output_and_the_engines_work(
    plane: DataPlane, tokens_per_step: int
) -> None:
    plane.engine.tokens_per_step = tokens_per_step
    plane.engine.steps_allowed = math.ceil(len("one STOP") / tokens_per_step)
    made = make_spec("one STOP two ", stopping={"max_tokens": 50, "stop": ["STOP"]}, output={"token_ids": True})
    events = await plane.stream(made)
    finished = events[-2].finished
    assert text_of(events) == "one "
    assert (finished.reason, finished.stop) == (inference_pb2.FINISH_REASON_STOP, "STOP")
    assert finished.completion_tokens == len("one STOP")
    assert bytes(token_id for event in events for token_id in event.delta.token_ids) == b"one "
    await plane.engine.until_idle()
    assert plane.engine.aborted == [plane.engine.requests[0].request_id]


async def test_text_is_held_back_while_it_could_begin_a_stop_string(plane: DataPlane) -> None:
    plane.engine.scripts.append(b"a STONE")
    plane.engine.steps_allowed = 5  # "a STO"
    texts = []
    made = make_spec(stopping={"max_tokens": 7, "stop": ["STOP"]})
    async for event in plane.stub.StreamGenerate(StreamGenerateRequest(spec=made)):
        texts.append(event.delta.text)
        if "".join(texts) == "a ":
            plane.engine.allow_steps(2)
    assert "".join(texts) == "a STONE"


async def test_text_that_only_began_a_stop_string_comes_at_the_end(plane: DataPlane) -> None:
    plane.engine.scripts.append(b"a STO")
    assert text_of(await plane.stream(make_spec(stopping={"max_tokens": 5, "stop": ["STOP"]}))) == "a STO"


async def test_include_stop_shows_the_stop_string(plane: DataPlane) -> None:
    made = make_spec("one STOP two ", stopping={"max_tokens": 50, "stop": ["STOP"], "include_stop": True})
    assert text_of(await plane.stream(made)) == "one STOP"


async def test_stop_string_works_without_text(plane: DataPlane) -> None:
    made = make_spec("one STOP two ", stopping={"max_tokens": 50, "stop": ["STOP"]}, output={"text": False})
    events = await plane.stream(made)
    assert events[-2].finished.stop == "STOP"
    assert text_of(events) == ""


async def test_no_stop_string_before_min_tokens(plane: DataPlane) -> None:
    made = make_spec("ab.", stopping={"max_tokens": 50, "min_tokens": 6, "stop": ["."]}, output={"token_ids": True})
    events = await plane.stream(made)
    assert (text_of(events), events[-2].finished.completion_tokens) == ("ab.ab", 6)


async def test_without_max_tokens_the_context_is_the_limit(plane: DataPlane) -> None:
    events = await plane.stream(make_spec("abc", stopping={}))
    finished = events[-2].finished
    assert finished.reason == inference_pb2.FINISH_REASON_CONTEXT_LIMIT
    assert finished.completion_tokens == plane.engine.limits.max_model_len - 3


def test_every_reason_of_the_engine_is_one_of_the_contract() -> None:
    unsaid = {FinishReason.ERROR, FinishReason.CANCELLED}  # a status; nothing: what was aborted has no further output
    for reason in set(FinishReason) - unsaid:
        assert inference_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}")


# ---- several outputs -------------------------------------------------------------------------------------------------


async def test_n_outputs_share_a_stream(plane: DataPlane) -> None:
    plane.engine.scripts += [b"aaaa", b"bb\x01", b"cccc"]
    events = await plane.stream(make_spec(sampling={"n": 3}, stopping={"max_tokens": 4, "stop_token_ids": [1]}))
    assert [text_of(events, index) for index in range(3)] == ["aaaa", "bb", "cccc"]
    finished = {event.finished.output_index: event.finished for event in events if event.HasField("finished")}
    assert {index: entry.completion_tokens for index, entry in finished.items()} == {0: 4, 1: 3, 2: 4}
    assert finished[1].reason == inference_pb2.FINISH_REASON_STOP
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds.count("started"), kinds.count("finished"), kinds.count("completed")) == (1, 3, 1)
    assert events[-1].completed.usage.completion_tokens == 11
    assert events[-1].completed.usage.prompt_tokens == 3


async def test_no_delta_of_an_output_after_its_finished(plane: DataPlane) -> None:
    plane.engine.scripts += [b"aaaa", b"x."]
    events = await plane.stream(make_spec(sampling={"n": 2}, stopping={"max_tokens": 4, "stop": ["."]}))
    ended: set[int] = set()
    for event in events:
        if event.HasField("finished"):
            ended.add(event.finished.output_index)
        assert not (event.HasField("delta") and event.delta.output_index in ended)
    assert ended == {0, 1}


async def test_n_outputs_have_seeds_of_their_own_and_the_first_has_the_requests(plane: DataPlane) -> None:
    await plane.stream(make_spec(sampling={"n": 3, "seed": 7}))
    seeds = [request.sampling.seed for request in plane.engine.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_unary_returns_n_outputs_in_order(plane: DataPlane) -> None:
    plane.engine.scripts += [b"aaaa", b"b.", b"cccc"]
    response = await plane.generate(make_spec(sampling={"n": 3}, stopping={"max_tokens": 4, "stop": ["."]}))
    assert [output.text for output in response.outputs] == ["aaaa", "b", "cccc"]
    assert [output.finished.output_index for output in response.outputs] == [0, 1, 2]


# ---- log-probabilities -----------------------------------------------------------------------------------------------


async def test_logprobs_name_tokens_and_the_likeliest(plane: DataPlane) -> None:
    events = await plane.stream(make_spec("ab", stopping={"max_tokens": 2}, output={"top_logprobs": 2}))
    first, second = (entry for event in events for entry in event.delta.logprobs)
    assert (first.token_id, first.text, first.rank) == (ord("a"), "a", 1)
    assert first.logprob == pytest.approx(-ord("a") / 256)
    assert [(top.token_id, top.text, top.bytes) for top in first.top] == [(0, "\0", b"\0"), (1, "\1", b"\1")]
    assert second.text == "b"


async def test_logprobs_of_the_token_alone(plane: DataPlane) -> None:
    events = await plane.stream(make_spec("ab", stopping={"max_tokens": 2}, output={"logprobs": True}))
    entries = [entry for event in events for entry in event.delta.logprobs]
    assert [(entry.text, len(entry.top)) for entry in entries] == [("a", 0), ("b", 0)]


async def test_part_of_a_character_is_shown_as_such_in_logprobs(plane: DataPlane) -> None:
    plane.engine.scripts.append("é".encode())
    events = await plane.stream(make_spec(stopping={"max_tokens": 2}, output={"logprobs": True}))
    entries = [entry for event in events for entry in event.delta.logprobs]
    assert [entry.text for entry in entries] == ["�", "�"]
    assert b"".join(entry.bytes for entry in entries) == "é".encode()


async def test_prompt_logprobs_come_before_the_first_delta(plane: DataPlane) -> None:
    events = await plane.stream(make_spec("abc", output={"prompt_logprobs": 1}, sampling={"n": 2}))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[:2] == ["started", "prompt_logprobs"]
    assert "prompt_logprobs" not in kinds[2:]
    first, second, third = events[1].prompt_logprobs.logprobs
    assert (first.text, first.HasField("logprob")) == ("a", False)
    assert (second.text, third.text, len(second.top)) == ("b", "c", 1)


async def test_long_prompt_logprobs_are_cut_into_messages(plane: DataPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_service.requests.outputs.PROMPT_LOGPROBS_PER_MESSAGE", 10)
    events = await plane.stream(make_spec("x" * 25, output={"prompt_logprobs": 0}))
    sizes = [len(event.prompt_logprobs.logprobs) for event in events if event.HasField("prompt_logprobs")]
    assert sizes == [10, 10, 5]


async def test_a_request_for_no_tokens_says_how_likely_its_prompt_is_and_has_an_empty_output(plane: DataPlane) -> None:
    asked = {"prompt_logprobs": 0, "logprob_token_ids": [1, 2]}
    answer = await plane.generate(make_spec("abc", stopping={"max_tokens": 0}, output=asked))
    assert [list(entry.named_logprobs) for entry in answer.prompt_logprobs] == [[], *[[-1 / 256, -2 / 256]] * 2]
    [output] = answer.outputs
    assert (output.text, output.finished.reason) == ("", inference_pb2.FINISH_REASON_MAX_TOKENS)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    assert not answer.HasField("seed")


async def test_named_tokens_alone_ask_for_logprobs(plane: DataPlane) -> None:
    answer = await plane.generate(make_spec("a", stopping={"max_tokens": 2}, output={"logprob_token_ids": [8]}))
    assert [list(entry.named_logprobs) for entry in answer.outputs[0].logprobs] == [[-8 / 256]] * 2


@pytest.mark.parametrize(
    ("output", "field"),
    [
        ({"logprob_token_ids": [258]}, "spec.output.logprob_token_ids"),
        ({"logprob_token_ids": [1], "logprobs": False}, "spec.output.logprob_token_ids"),
        ({"logprobs_mode": 9}, "spec.output.logprobs_mode"),
    ],
)
async def test_logprobs_that_cannot_be_told_are_refused_by_name(plane: DataPlane, output: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await plane.generate(make_spec("a", output=output))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(refused.value.details())


# ---- what reaches the engine -----------------------------------------------------------------------------------------


async def test_absent_is_the_default_and_zero_is_zero(plane: DataPlane) -> None:
    plane.models.models["demo"].default_sampling.temperature = 0.7
    plane.models.models["demo"].default_sampling.top_k = 40
    await plane.stream(make_spec())
    await plane.stream(make_spec(sampling={"temperature": 0.0}))
    absent, zero = (request.sampling for request in plane.engine.requests)
    assert (absent.temperature, absent.top_k) == (0.7, 40)
    assert (zero.temperature, zero.top_k) == (0.0, 40)


async def test_the_seed_is_drawn_and_reported(plane: DataPlane) -> None:
    completed = (await plane.stream(make_spec()))[-1].completed
    assert completed.seed == plane.engine.requests[0].sampling.seed


async def test_greedy_has_no_seed_to_report(plane: DataPlane) -> None:
    completed = (await plane.stream(make_spec(sampling={"temperature": 0.0, "seed": 5})))[-1].completed
    assert not completed.HasField("seed")


async def test_everything_of_the_spec_reaches_the_engine(plane: DataPlane) -> None:
    made = make_spec(
        sampling={
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "typical_p": 0.8,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": -0.3,
            "seed": 2**64 - 1,
            "logit_bias": {65: 2.0},
            "allowed_token_ids": [65, 66],
        },
        stopping={"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [66], "time_limit": {"seconds": 3}},
        output={
            "top_logprobs": 3,
            "prompt_logprobs": 4,
            "logprob_token_ids": [67, 65],
            "logprobs_mode": generation_pb2.LOGPROBS_MODE_PROCESSED,
        },
        cache={"bypass_prefix_cache": True, "salt": "s"},
        watermark={"key": b"k" * 16, "gamma": 0.5},
        priority=-5,
    )
    await plane.generate(made)
    [request] = plane.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.typical_p, sampling.repetition_penalty) == (0.8, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (0.2, -0.3, 2**64 - 1)
    assert (sampling.logit_bias, sampling.allowed_token_ids) == ({65: 2.0}, (65, 66))
    assert (sampling.max_tokens, sampling.min_tokens, sampling.stop_token_ids) == (9, 2, (66,))
    assert (sampling.eos_token_ids, sampling.time_limit_seconds) == ((EOS,), 3.0)
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs) == (3, 4)
    assert sampling.watermark == Watermark(b"k" * 16, 0.5, 2.0, 1)
    assert (sampling.logprob_token_ids, sampling.processed_logprobs) == ((67, 65), True)
    assert (request.bypass_prefix_cache, request.priority) == (True, 5)


async def test_tenants_never_share_a_cache_salt(plane: DataPlane) -> None:
    for tenant in ("a", "b"):
        await plane.generate(make_spec(cache={"salt": "s"}), metadata=(("loraplex-tenant", tenant),))
    first, second = (request.cache_salt for request in plane.engine.requests)
    assert first != second


# ---- prompts ---------------------------------------------------------------------------------------------------------


async def test_token_ids_go_as_they_are(plane: DataPlane) -> None:
    await plane.generate(make_spec(prompt={"token_ids": {"ids": [1, 2, 257]}}))
    assert plane.engine.requests[0].prompt_token_ids == [1, 2, 257]


async def test_truncation_keeps_the_end(plane: DataPlane) -> None:
    await plane.generate(make_spec(prompt={"text": "abcdef", "truncate_to_tokens": 2}))
    assert bytes(plane.engine.requests[0].prompt_token_ids) == b"ef"


async def test_chat_is_rendered_by_the_models_template(plane: DataPlane) -> None:
    chat = Chat(messages=[ChatMessage(role="user", content="hi")])
    await plane.generate(make_spec(prompt=Prompt(chat=chat)))
    assert bytes(plane.engine.requests[0].prompt_token_ids) == b"[user]hi[assistant]"


async def test_chat_continues_the_final_message(plane: DataPlane) -> None:
    messages = [ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="Well")]
    await plane.generate(make_spec(prompt=Prompt(chat=Chat(messages=messages, continue_final_message=True))))
    assert bytes(plane.engine.requests[0].prompt_token_ids) == b"[user]hi[assistant]Well"
