"""What the service says, in OpenAI's words: reasoning, calls of tools, and what JSON has no number for."""

import json
import threading
from typing import Any

import msgspec
import pytest

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import (
    FINISH_REASON_CONTEXT_LIMIT,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    Delta,
    Finished,
    GenerateOutput,
    GenerateResponse,
    Started,
    StreamGenerateResponse,
    TokenLogprob,
    TopLogprob,
)
from loraplex.v1.prompt_pb2 import ToolCall
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_service.http.answers import ChatAnswers, TextAnswers
from loraplex_service.http.exchange import SMALL_BYTES, Exchange, Room
from loraplex_service.http.parameters import Draft

CALLS = [ToolCall(id="a", name="now", arguments_json="{}"), ToolCall(id="b", name="legs", arguments_json='{"n": 4}')]
TOLD = [
    {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    {"id": "b", "type": "function", "function": {"name": "legs", "arguments": '{"n": 4}'}},
]
STARTED = Started(request_id="r", target=ResolvedTarget(model_revision="v1"))


def draft(**fields: Any) -> Draft:
    return Draft(GenerateSpec(model="tiny"), **fields)


def whole(output: GenerateOutput, said: Draft | None = None) -> dict[str, Any]:
    answer = ChatAnswers(said or draft()).whole([GenerateResponse(request_id="r", outputs=[output])])
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def sent(choice: dict[str, Any]) -> Any:
    """As a caller reads it."""
    return json.loads(msgspec.json.encode(choice))


def streamed(*events: Delta | Finished) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    answers = ChatAnswers(draft())
    messages = [StreamGenerateResponse(started=STARTED)]
    for event in events:
        kind = "delta" if isinstance(event, Delta) else "finished"
        messages.append(StreamGenerateResponse(**{kind: event}))  # type: ignore[arg-type]
    chunks = [chunk for message in messages for chunk in answers.chunks(message)]
    assert {(chunk["id"], chunk["system_fingerprint"]) for chunk in chunks} == {("chatcmpl-r", "v1")}
    return [chunk["choices"][0] for chunk in chunks]


def test_calls_of_tools_stand_apart_from_the_text() -> None:
    choice = whole(GenerateOutput(tool_calls=CALLS, finished=Finished(reason=FINISH_REASON_TOOL_CALLS)))
    assert choice["message"] == {"role": "assistant", "content": None, "tool_calls": TOLD}
    assert choice["finish_reason"] == "tool_calls"


def test_calls_in_a_stream_are_numbered_through() -> None:
    first, second = Delta(tool_calls=CALLS[:1]), Delta(tool_calls=CALLS[1:])
    opening, *calls, end = streamed(first, second, Finished(reason=FINISH_REASON_TOOL_CALLS))
    assert opening["delta"]["role"] == "assistant"
    assert [choice["delta"]["tool_calls"] for choice in calls] == [[{"index": 0, **TOLD[0]}], [{"index": 1, **TOLD[1]}]]
    assert (end["delta"], end["finish_reason"]) == ({}, "tool_calls")


def test_reasoning_stands_apart_and_can_be_left_out() -> None:
    output = GenerateOutput(text="4", reasoning="2 and 2")
    assert whole(output)["message"]["reasoning_content"] == "2 and 2"
    assert "reasoning_content" not in whole(output, draft(include_reasoning=False))["message"]
    assert streamed(Delta(reasoning="2 and 2"))[1]["delta"] == {"reasoning_content": "2 and 2"}


def test_outputs_of_a_stream_each_begin_with_their_role() -> None:
    choices = streamed(
        Delta(output_index=1, text="b"), Delta(output_index=0, text="a"), Delta(output_index=1, text="c")
    )
    assert [choice["index"] for choice in choices if "role" in choice["delta"]] == [1, 0]


def test_an_output_that_ends_before_its_first_token_has_a_role_and_an_end() -> None:
    opening, end = streamed(Finished(reason=FINISH_REASON_CONTEXT_LIMIT))
    assert opening["delta"] == {"role": "assistant", "content": ""}
    assert end["finish_reason"] == "length"


def test_a_stop_token_is_told_and_token_zero_is_one() -> None:
    finished = Finished(reason=FINISH_REASON_STOP, stop_token_id=0)
    assert whole(GenerateOutput(finished=finished))["stop_reason"] == 0


def test_what_cannot_be_has_a_number_that_json_knows() -> None:
    never = TokenLogprob(text="x", logprob=float("-inf"), top=[TopLogprob(text="y", logprob=float("-inf"))])
    [told] = sent(whole(GenerateOutput(logprobs=[never])))["logprobs"]["content"]
    assert (told["logprob"], told["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


def shown(text: str, *tokens: bytes) -> GenerateOutput:
    return GenerateOutput(text=text, logprobs=[TokenLogprob(bytes=each, logprob=-1.0) for each in tokens])


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("abc", (b"<bos>", b"a", b"<tool>", b"bc", b"<eos>"), [0, 0, 1, 1, 3]),
        ("aéb", (b"a", b"\xc3", b"\xa9", b"b"), [0, 1, 1, 2]),
        ("a\ufffdb", (b"a", b"\xc3", b"b"), [0, 1, 1]),
        ("Once upon", (b" Once", b" upon"), [0, 4]),
        ("ab<eos>", (b"ab", b"<eos>"), [0, 2]),
    ],
    ids=["special tokens", "shared characters", "broken characters", "first spaces", "special tokens that are shown"],
)
def test_offsets_are_places_in_the_text(text: str, tokens: tuple[bytes, ...], offsets: list[int]) -> None:
    asked = draft()
    asked.message.output.logprobs = True
    response = GenerateResponse(request_id="r", outputs=[shown(text, *tokens)])
    [choice] = TextAnswers(asked).whole([response])["choices"]
    assert choice["logprobs"]["text_offset"] == offsets


def test_offsets_in_a_stream_go_on_where_the_text_was() -> None:
    asked = draft()
    asked.message.output.logprobs = True
    answers, parts = TextAnswers(asked), [("a", b"a"), ("", b"<tool>"), ("", b"\xc3"), ("é", b"\xa9"), ("b", b"b")]
    offsets = []
    for text, token in parts:
        delta = Delta(text=text, logprobs=shown(text, token).logprobs)
        [chunk] = answers.chunks(StreamGenerateResponse(delta=delta))
        offsets += chunk["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 1, 1, 1, 2]


def test_prompt_logprobs_are_by_token_id_as_vllm_has_them() -> None:
    tokens = [TokenLogprob(token_id=7), TokenLogprob(token_id=8, text="b", logprob=-2.0, rank=5)]
    response = GenerateResponse(request_id="r", outputs=[GenerateOutput(text="c")], prompt_logprobs=tokens)
    [choice] = TextAnswers(draft()).whole([response])["choices"]
    assert choice["prompt_logprobs"] == [None, {"8": {"logprob": -2.0, "rank": 5, "decoded_token": "b"}}]


@pytest.mark.parametrize("size", [SMALL_BYTES, SMALL_BYTES + 1])
async def test_a_large_answer_is_made_beside_the_loop(size: int) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"method": "GET", "path": "/", "headers": []}
    exchange = Exchange(scope, receive, send, Room(1, 1, seconds=1.0))
    await exchange.answer_with(threading.get_ident, size, {"x-request-id": "r"})
    made_here = json.loads(sent[1]["body"]) == threading.get_ident()
    assert (sent[0]["status"], made_here) == (200, size <= SMALL_BYTES)
