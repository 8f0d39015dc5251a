"""What a model thinks, says and calls, as the blocks of Anthropic's messages."""

from typing import Any

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import (
    FINISH_REASON_CONTEXT_LIMIT,
    FINISH_REASON_EOS,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    Completed,
    Delta,
    Finished,
    GenerateOutput,
    GenerateResponse,
    Started,
    StreamGenerateResponse,
    Usage,
)
from loraplex.v1.prompt_pb2 import ToolCall
from loraplex_service.http.messages.answers import MessageAnswers
from loraplex_service.http.parameters import Draft

CALLS = [ToolCall(id="a", name="now", arguments_json="{}"), ToolCall(id="b", name="legs", arguments_json='{"n": 4}')]
USAGE = Usage(prompt_tokens=9, cached_prompt_tokens=4, completion_tokens=3)
BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "2 and 2", "signature": ""},
    {"type": "text", "text": "so"},
    {"type": "tool_use", "id": "a", "name": "now", "input": {}},
    {"type": "tool_use", "id": "b", "name": "legs", "input": {"n": 4}},
]


def whole(output: GenerateOutput, **fields: Any) -> dict[str, Any]:
    response = GenerateResponse(request_id="r", outputs=[output], usage=USAGE)
    return MessageAnswers(Draft(GenerateSpec(model="tiny"), **fields)).whole([response])


def streamed(*deltas: Delta, reason: Any = FINISH_REASON_EOS) -> list[dict[str, Any]]:
    answers = MessageAnswers(Draft(GenerateSpec(model="tiny")))
    started = Started(request_id="r", prompt_tokens=9, cached_prompt_tokens=4)
    messages = [
        StreamGenerateResponse(started=started),
        *(StreamGenerateResponse(delta=delta) for delta in deltas),
        StreamGenerateResponse(finished=Finished(reason=reason)),
        StreamGenerateResponse(completed=Completed(usage=USAGE)),
    ]
    return [event for message in messages for event in answers.chunks(message)]


def gathered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of each block: its start, what was added, its end."""
    blocks: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({"start": event["content_block"], "added": [], "ended": False})
            case "content_block_delta":
                assert not blocks[event["index"]]["ended"]
                blocks[event["index"]]["added"].append(event["delta"])
            case "content_block_stop":
                blocks[event["index"]]["ended"] = True
    return blocks


def test_thoughts_text_and_calls_are_blocks() -> None:
    finished = Finished(reason=FINISH_REASON_TOOL_CALLS)
    message = whole(GenerateOutput(reasoning="2 and 2", text="so", tool_calls=CALLS, finished=finished))
    assert message["content"] == BLOCKS
    assert message["stop_reason"] == "tool_use"


def test_thoughts_can_be_left_out() -> None:
    message = whole(GenerateOutput(reasoning="2 and 2", text="so"), include_reasoning=False)
    assert message["content"] == BLOCKS[1:2]


def test_tokens_are_counted_as_anthropic_counts_them() -> None:
    usage = whole(GenerateOutput(text="so"))["usage"]
    told = (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"])
    assert told == (5, 4, 3)


def test_a_full_context_is_told_as_such() -> None:
    finished = Finished(reason=FINISH_REASON_CONTEXT_LIMIT)
    assert whole(GenerateOutput(finished=finished))["stop_reason"] == "model_context_window_exceeded"


def test_a_stop_token_is_a_stop_sequence_without_a_text() -> None:
    message = whole(GenerateOutput(finished=Finished(reason=FINISH_REASON_STOP, stop_token_id=0)))
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", None)


def test_blocks_of_a_stream_follow_each_other() -> None:
    deltas = [Delta(reasoning="2 "), Delta(reasoning="and 2"), Delta(text="s"), Delta(text="o", tool_calls=CALLS)]
    blocks = gathered(streamed(*deltas, reason=FINISH_REASON_TOOL_CALLS))
    assert all(block["ended"] for block in blocks)
    assert [block["start"]["type"] for block in blocks] == [block["type"] for block in BLOCKS]
    thoughts, text, first, second = (block["added"] for block in blocks)
    *thoughts, signature = thoughts
    assert thoughts == [{"type": "thinking_delta", "thinking": part} for part in ("2 ", "and 2")]
    assert signature == {"type": "signature_delta", "signature": ""}
    assert text == [{"type": "text_delta", "text": part} for part in ("s", "o")]
    assert first == [{"type": "input_json_delta", "partial_json": "{}"}]
    assert second == [{"type": "input_json_delta", "partial_json": '{"n": 4}'}]
    assert blocks[3]["start"] == {**BLOCKS[3], "input": {}}


def test_an_output_of_nothing_is_a_message_without_blocks() -> None:
    assert [event["type"] for event in streamed()] == ["message_start", "message_delta", "message_stop"]
    assert whole(GenerateOutput())["content"] == []
