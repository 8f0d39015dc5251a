"""What a model thinks, says and calls, as the items of OpenAI's Responses."""

import json
from typing import Any

import grpc
import msgspec
from google.rpc.status_pb2 import Status

from loraplex import LoraplexError
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import (
    FINISH_REASON_EOS,
    FINISH_REASON_MAX_TOKENS,
    Completed,
    Delta,
    Finished,
    GenerateOutput,
    GenerateResponse,
    Started,
    StreamGenerateResponse,
    TokenLogprob,
)
from loraplex.v1.prompt_pb2 import ToolCall
from loraplex_service.http.failures import failed
from loraplex_service.http.parameters import Draft
from loraplex_service.http.responses.answers import ResponseAnswers

CALLS = [ToolCall(id="a", name="now", arguments_json="{}"), ToolCall(id="b", name="legs", arguments_json='{"n": 4}')]
KINDS = ["reasoning", "message", "function_call", "function_call"]


def sent(told: Any) -> Any:
    """As a caller reads it."""
    return json.loads(msgspec.json.encode(told))


def answers() -> ResponseAnswers:
    return ResponseAnswers(Draft(GenerateSpec(model="tiny")))


def streamed(*deltas: Delta, reason: Any = FINISH_REASON_EOS) -> list[dict[str, Any]]:
    told = answers()
    messages = [
        StreamGenerateResponse(started=Started(request_id="r")),
        *(StreamGenerateResponse(delta=delta) for delta in deltas),
        StreamGenerateResponse(finished=Finished(reason=reason)),
        StreamGenerateResponse(completed=Completed()),
    ]
    return [sent(event) for message in messages for event in told.chunks(message)]


DELTAS = (Delta(reasoning="2 "), Delta(reasoning="and 2"), Delta(text="s"), Delta(text="o", tool_calls=CALLS))
OUTPUT = GenerateOutput(reasoning="2 and 2", text="so", tool_calls=CALLS, finished=Finished(reason=FINISH_REASON_EOS))


def test_thoughts_text_and_calls_are_items() -> None:
    response = answers().whole([GenerateResponse(request_id="r", outputs=[OUTPUT])])
    thought, message, first, second = response["output"]
    assert [item["type"] for item in response["output"]] == KINDS
    assert thought["content"] == [{"type": "reasoning_text", "text": "2 and 2"}]
    assert message["content"] == [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}]
    assert (first["call_id"], first["name"], first["arguments"]) == ("a", "now", "{}")
    assert (second["call_id"], second["arguments"]) == ("b", '{"n": 4}')
    assert {item["status"] for item in response["output"]} == {response["status"]} == {"completed"}
    assert len({item["id"] for item in response["output"]}) == 4


def test_a_stream_has_the_same_items_in_the_end() -> None:
    whole = answers().whole([GenerateResponse(request_id="r", outputs=[OUTPUT])])
    events = streamed(*DELTAS)
    assert (events[-1]["type"], events[-1]["response"]["output"]) == ("response.completed", whole["output"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == whole["output"]


def test_items_of_a_stream_grow_one_after_the_other() -> None:
    events = streamed(*DELTAS)[2:-1]
    assert [event["output_index"] for event in events] == sorted(event["output_index"] for event in events)
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["type"] for item in added] == KINDS
    assert {item["status"] for item in added} == {"in_progress"}
    assert [item.get("content", item.get("arguments")) for item in added] == [[], [], "", ""]
    grown: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    assert list(grown.values()) == ["2 and 2", "so", "{}", '{"n": 4}']


def test_log_probabilities_come_with_the_text_of_their_tokens() -> None:
    tokens = [TokenLogprob(text=text, logprob=-1.0) for text in "abc"]
    events = streamed(
        Delta(logprobs=tokens[:1]), Delta(text="ab", logprobs=tokens[1:2]), Delta(text="c", logprobs=tokens[2:])
    )
    told = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [[token["token"] for token in each] for each in told] == [["a", "b"], ["c"]]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert (done["text"], [token["token"] for token in done["logprobs"]]) == ("abc", ["a", "b", "c"])


THOUGHT = [TokenLogprob(text=text, bytes=text.encode(), logprob=-1.0) for text in ("<think>", "yes", " or", " no")]
ANSWER = [TokenLogprob(text=text, bytes=text.encode(), logprob=-1.0) for text in ("</think>", "\n", "yes", "!", "</s>")]
LATER = [TokenLogprob(text=text, bytes=text.encode(), logprob=-1.0) for text in "yes"]
END = Finished(reason=FINISH_REASON_EOS)


def spelt(item: dict[str, Any]) -> list[str]:
    return [token["token"] for token in item["content"][0]["logprobs"]]


def test_the_tokens_of_a_text_are_neither_those_of_thoughts_nor_marks() -> None:
    events = streamed(Delta(reasoning="yes or no", logprobs=THOUGHT), Delta(text="yes!", logprobs=ANSWER))
    [delta] = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [token["token"] for token in delta["logprobs"]] == ["yes", "!"]
    assert spelt(events[-1]["response"]["output"][1]) == ["yes", "!"]


def test_the_tokens_of_a_text_are_found_in_a_whole_output() -> None:
    output = GenerateOutput(reasoning="yes or no", text="yes!", logprobs=[*THOUGHT, *ANSWER])
    response = sent(answers().whole([GenerateResponse(request_id="r", outputs=[output])]))
    assert spelt(response["output"][1]) == ["yes", "!"]


def test_tokens_wait_for_their_text() -> None:
    events = streamed(Delta(text="y", logprobs=LATER), Delta(text="es", logprobs=LATER[:0]))
    told = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [[token["token"] for token in each] for each in told] == [["y"], ["e", "s"]]


def test_a_token_is_spelt_once() -> None:
    told = answers()
    messages = [StreamGenerateResponse(delta=Delta(text="yes", logprobs=LATER)), StreamGenerateResponse(finished=END)]
    events = [event for message in messages for event in told.chunks(message)]
    spelt = [event["logprobs"] for event in events if "logprobs" in event]
    assert len(spelt) == 2
    assert all(first is second for first, second in zip(*spelt, strict=True))


def test_a_call_that_came_is_complete_where_the_output_was_cut() -> None:
    events = streamed(Delta(text="so"), Delta(tool_calls=CALLS[:1]), reason=FINISH_REASON_MAX_TOKENS)
    response = events[-1]["response"]
    assert (response["status"], [item["status"] for item in response["output"]]) == ("incomplete", ["completed"] * 2)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == response["output"]


def test_a_text_that_was_cut_is_incomplete() -> None:
    events = streamed(Delta(reasoning="hm"), Delta(text="so"), reason=FINISH_REASON_MAX_TOKENS)
    assert [item["status"] for item in events[-1]["response"]["output"]] == ["completed", "incomplete"]


def test_what_was_open_when_a_response_failed_is_incomplete() -> None:
    told = answers()
    for message in (Delta(reasoning="hm"), Delta(text="so")):
        list(told.chunks(StreamGenerateResponse(delta=message)))
    response = told.failed(failed(LoraplexError(grpc.StatusCode.UNAVAILABLE, Status())))["response"]
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
