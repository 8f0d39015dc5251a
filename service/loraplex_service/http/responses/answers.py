"""Outputs as OpenAI's Responses, whole and as the events of a stream."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from loraplex.v1.inference_pb2 import Usage
from loraplex_service.http.answers import FINISH_REASONS, Json
from loraplex_service.http.blocks import CALL, REASONING, TEXT, Block, BlockAnswers
from loraplex_service.http.failures import Failure

ITEM_IDS = {REASONING: "rs", TEXT: "msg", CALL: "fc"}
PARTS = {REASONING: "reasoning_text", TEXT: "output_text"}


OR_NULL = ("instructions", "max_output_tokens", "temperature", "top_p", "user", "prompt_cache_key", "safety_identifier")
REPEATED = (*OR_NULL, "metadata", "parallel_tool_calls", "reasoning", "text", "tool_choice", "tools", "top_logprobs")


class ResponseAnswers(BlockAnswers):
    """Of /v1/responses."""

    prefix = "resp_"
    _sent = 0  # events

    def failed(self, failure: Failure) -> Json:
        told = failure.body["error"]
        code = "rate_limit_exceeded" if failure.status == 429 else "server_error"
        response = {**self._response("failed"), "error": {**told, "code": code}}
        return self._event("response.failed", response=response)

    def _message(self, usage: Usage) -> Json:
        return {**self._response(self._status), "usage": _usage(usage)}

    def _begin(self) -> Iterator[Json]:
        for event in ("response.created", "response.in_progress"):
            yield self._event(event, response=self._response("in_progress"))

    def _opened(self, block: Block) -> Iterator[Json]:
        empty = {**self._item(block), "status": "in_progress"}
        if block.kind == CALL:
            yield self._event("response.output_item.added", output_index=block.index, item={**empty, "arguments": ""})
            return
        yield self._event("response.output_item.added", output_index=block.index, item={**empty, "content": []})
        yield self._event("response.content_part.added", **self._place(block), part=_part(block))

    def _grown(self, block: Block, text: str, logprobs: Sequence[msgspec.Raw]) -> Iterator[Json]:
        told = {"logprobs": logprobs} if block.kind == TEXT else {}
        yield self._event(f"response.{_grows(block)}.delta", **self._place(block), delta=text, **told)

    def _closed(self, block: Block) -> Iterator[Json]:
        done = f"response.{_grows(block)}.done"
        if block.call is not None:
            yield self._event(done, **self._place(block), name=block.call.name, arguments=block.text)
        else:
            told = {"logprobs": block.logprobs} if block.kind == TEXT else {}
            yield self._event(done, **self._place(block), text=block.text, **told)
            yield self._event("response.content_part.done", **self._place(block), part=_part(block))
        yield self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def _end(self, usage: Usage) -> Iterator[Json]:
        yield self._event(f"response.{self._status}", response=self._message(usage))

    # ---- parts of them -----------------------------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return "incomplete" if FINISH_REASONS.get(self._finished.reason) == "length" else "completed"

    def _event(self, kind: str, **content: Any) -> Json:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **content}

    def _place(self, block: Block) -> Json:
        place: Json = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind == CALL else {**place, "content_index": 0}

    def _item_id(self, block: Block) -> str:
        return f"{ITEM_IDS[block.kind]}_{self._id.removeprefix(self.prefix)}_{block.index}"

    def _item(self, block: Block) -> Json:
        """A block as an item of the output."""
        head: Json = {"id": self._item_id(block), "status": "incomplete" if self._is_cut(block) else "completed"}
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": block.text}
            return {**head, "type": "function_call", **call}
        if block.kind == REASONING:
            nothing: Json = {"summary": [], "encrypted_content": None}
            return {**head, "type": "reasoning", **nothing, "content": [_part(block)]}
        return {**head, "type": "message", "role": "assistant", "content": [_part(block)]}

    def _is_cut(self, block: Block) -> bool:
        """Whether a block has not come to its end. Calls come whole."""
        ends_so = self._status == "incomplete" and block is self._blocks[-1] and block.kind != CALL
        return ends_so or block is self._open

    def _response(self, status: str) -> Json:
        """The response as it is now, with what was asked for."""
        given = self._draft.given
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "model": self._draft.message.model,
            "output": [] if status == "in_progress" else [self._item(block) for block in self._blocks],
            "usage": None,
            **{name: given.get(name) for name in OR_NULL},
            "metadata": given.get("metadata") or {},
            "parallel_tool_calls": given.get("parallel_tool_calls") is not False,
            "reasoning": {"effort": None, "summary": None, **(given.get("reasoning") or {})},
            "text": {"format": {"type": "text"}, **(given.get("text") or {})},
            "tool_choice": given.get("tool_choice") or "auto",
            "tools": given.get("tools") or [],
            "top_logprobs": given.get("top_logprobs") or 0,
            "background": False,
            "max_tool_calls": None,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
        }


def _grows(block: Block) -> str:
    return PARTS.get(block.kind, "function_call_arguments")


def _part(block: Block) -> Json:
    part: Json = {"type": PARTS[block.kind], "text": block.text}
    if block.kind == REASONING:
        return part
    return {**part, "annotations": [], "logprobs": block.logprobs}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
