"""Outputs as Anthropic's messages, whole and as the events of a stream."""

import json
from collections.abc import Iterator, Sequence

import msgspec

from loraplex.v1.inference_pb2 import FinishReason, Usage
from loraplex_service.http.answers import Json
from loraplex_service.http.blocks import CALL, REASONING, Block, BlockAnswers
from loraplex_service.http.failures import Failure, anthropic_error

STOP_REASONS = {
    FinishReason.FINISH_REASON_MAX_TOKENS: "max_tokens",
    FinishReason.FINISH_REASON_TIME_LIMIT: "max_tokens",
    FinishReason.FINISH_REASON_CONTEXT_LIMIT: "model_context_window_exceeded",
    FinishReason.FINISH_REASON_TOOL_CALLS: "tool_use",
}


class MessageAnswers(BlockAnswers):
    """Of /v1/messages."""

    prefix = "msg_"
    pulse = b'event: ping\ndata: {"type": "ping"}\n\n'

    def failed(self, failure: Failure) -> Json:
        return anthropic_error(failure)

    def _message(self, usage: Usage) -> Json:
        content = [_told(block) for block in self._blocks]
        return {**self._head(), "content": content, **self._stop(), "usage": _usage(usage)}

    def _begin(self) -> Iterator[Json]:
        read = Usage(prompt_tokens=self._started.prompt_tokens, cached_prompt_tokens=self._started.cached_prompt_tokens)
        nothing: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(read)}
        yield {"type": "message_start", "message": {**self._head(), **nothing}}

    def _opened(self, block: Block) -> Iterator[Json]:
        empty = {**_told(block), "input": {}} if block.kind == CALL else _told(block)
        yield {"type": "content_block_start", "index": block.index, "content_block": empty}

    def _grown(self, block: Block, text: str, logprobs: Sequence[msgspec.Raw]) -> Iterator[Json]:
        yield {"type": "content_block_delta", "index": block.index, "delta": _added(block, text)}

    def _closed(self, block: Block) -> Iterator[Json]:
        if block.kind == REASONING:  # which clients that put a thought together by its deltas send back
            yield {
                "type": "content_block_delta",
                "index": block.index,
                "delta": {"type": "signature_delta", "signature": ""},
            }
        yield {"type": "content_block_stop", "index": block.index}

    def _end(self, usage: Usage) -> Iterator[Json]:
        yield {"type": "message_delta", "delta": self._stop(), "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def _head(self) -> Json:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._draft.message.model}

    def _stop(self) -> Json:
        if self._finished.WhichOneof("matched") is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._finished.stop or None}
        return {"stop_reason": STOP_REASONS.get(self._finished.reason, "end_turn"), "stop_sequence": None}


def _told(block: Block) -> Json:
    """A block as it is in a message."""
    if block.call is not None:
        arguments = json.loads(block.text or "{}")
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": arguments}
    if block.kind == REASONING:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text}


def _added(block: Block, text: str) -> Json:
    if block.kind == CALL:
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == REASONING:
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _usage(usage: Usage) -> Json:
    """What was consumed: to Anthropic tokens from the cache are no input tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_prompt_tokens,
        "output_tokens": usage.completion_tokens,
    }
