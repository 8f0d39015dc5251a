"""Outputs in OpenAI's words: whole, and as the chunks of a stream."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from loraplex.v1.inference_pb2 import (
    Delta,
    Finished,
    FinishReason,
    GenerateOutput,
    GenerateResponse,
    Started,
    StreamGenerateResponse,
    TokenLogprob,
    Usage,
)
from loraplex.v1.prompt_pb2 import ToolCall
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_service.http.failures import REQUEST_ID, Failure, openai_error
from loraplex_service.http.offsets import TextOffsets
from loraplex_service.http.parameters import Draft

FINISH_REASONS = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_EOS: "stop",
    FinishReason.FINISH_REASON_MAX_TOKENS: "length",
    FinishReason.FINISH_REASON_CONTEXT_LIMIT: "length",
    FinishReason.FINISH_REASON_TIME_LIMIT: "length",
    FinishReason.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON knows no infinity; this is OpenAI's word for it

Json = dict[str, Any]


class Said(Protocol):
    """What an output and a part of one have in common."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[TokenLogprob]: ...


def usage(used: Iterable[Usage]) -> Json:
    """What was consumed, of all prompts together."""
    total = Counter[str]()
    for one in used:
        total.update(prompt=one.prompt_tokens, completion=one.completion_tokens, cached=one.cached_prompt_tokens)
        total.update(drafts=one.accepted_draft_tokens, wrong=one.draft_tokens - one.accepted_draft_tokens)
    return {
        "prompt_tokens": total["prompt"],
        "completion_tokens": total["completion"],
        "total_tokens": total["prompt"] + total["completion"],
        "prompt_tokens_details": {"cached_tokens": total["cached"]},
        "completion_tokens_details": {
            "accepted_prediction_tokens": total["drafts"],
            "rejected_prediction_tokens": total["wrong"],
        },
    }


def finish(finished: Finished) -> Json:
    """Why an output ended; `stop_reason` is the stop string or token, as vLLM has it."""
    kind = finished.WhichOneof("matched")
    reason = None if kind is None else getattr(finished, kind)
    return {"finish_reason": FINISH_REASONS.get(finished.reason, "stop"), "stop_reason": reason}


class Answers:
    """The answer to one request, in the words of one API."""

    prefix = ""  # of its id
    last = DONE  # what ends a stream
    pulse = b": waiting\n\n"  # what a stream has while nothing comes

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._created = int(time.time())
        self._id = ""

    def whole(self, responses: Sequence[GenerateResponse]) -> Json:
        """The answer with all outputs of all prompts."""
        raise NotImplementedError

    def chunks(self, message: StreamGenerateResponse) -> Iterator[Json]:
        """The chunks that one message of a stream becomes."""
        raise NotImplementedError

    def failed(self, failure: Failure) -> Json:
        """The last chunk of a stream that failed."""
        return openai_error(failure)

    def headers(self, request_id: str, target: ResolvedTarget) -> dict[str, str]:
        """The headers of the answer."""
        return {REQUEST_ID: request_id, **version_header(target)}

    def _meet(self, request_id: str) -> None:
        self._id = self._id or f"{self.prefix}{request_id}"


VERSION = re.compile(r"@\w+(\*\S+)?")  # of an adapter, and its weight in a sum


def version_header(target: ResolvedTarget) -> dict[str, str]:
    """The adapter version that was used, and the adapter that it is one of."""
    if not target.adapter_version:
        return {}
    adapter = VERSION.sub("", target.adapter_version)
    return {"loraplex-adapter": adapter, "loraplex-adapter-version": target.adapter_version}


class Choices(Answers):
    """Outputs as choices beside each other, of which `object_name` tells the kind."""

    object_name = ""
    chunk_name = ""

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self._fingerprint: str | None = None
        self._version: Json = {}  # of the adapter: of several prompts each may have met another one
        self._prompt_ids: Json = {}
        self._begun: set[int] = set()  # the outputs of which something was sent
        self._prompt_tokens = 0
        self._completion_tokens = Counter[int]()  # by output: those that were sent

    def whole(self, responses: Sequence[GenerateResponse]) -> Json:
        choices: list[Json] = []
        for number, response in enumerate(responses):
            self._begin(response)
            for output in response.outputs:
                choices.append(self._placed(self._whole(len(choices), number, output, response)))
        return {**self._head(self.object_name), "choices": choices, "usage": usage(r.usage for r in responses)}

    def chunks(self, message: StreamGenerateResponse) -> Iterator[Json]:
        match message.WhichOneof("event"):
            case "started":
                self._begin(message.started)
                self._prompt_tokens = message.started.prompt_tokens
            case "delta":
                yield from self._opening(message.delta.output_index)
                self._completion_tokens[message.delta.output_index] += len(message.delta.token_ids)
                yield self._chunk(self._part(message.delta.output_index, message.delta))
            case "finished":
                index = message.finished.output_index
                yield from self._opening(index)
                self._completion_tokens[index] = message.finished.completion_tokens
                yield self._chunk({**self._nothing(index), **finish(message.finished)})
            case "completed":
                yield from self.usage_chunks([message.completed.usage])

    def chunks_of(self, first: int, number: int, response: GenerateResponse) -> Iterator[Json]:
        """The chunks of one of several prompts, whose outputs are complete. `first`: the index of its first output."""
        self._begin(response)
        self._prompt_tokens = response.usage.prompt_tokens
        for place, output in enumerate(response.outputs):
            self._completion_tokens[first + place] = output.finished.completion_tokens
            yield self._chunk(self._whole(first + place, number, output, response))

    def usage_chunks(self, used: Sequence[Usage]) -> Iterator[Json]:
        """The last chunk of a stream, where it was asked for."""
        if self._draft.include_usage:
            yield {**self._head(self.chunk_name), "choices": [], "usage": usage(used)}

    def _begin(self, started: Started | GenerateResponse) -> None:
        self._meet(started.request_id)
        self._fingerprint = started.target.model_revision or None
        self._version = {"adapter_version": version} if (version := started.target.adapter_version) else {}
        ids = started.prompt_token_ids
        self._prompt_ids = {"prompt_token_ids": list(ids)} if ids else {}

    def _head(self, name: str) -> Json:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._draft.message.model,
            "system_fingerprint": self._fingerprint,
        }

    def _placed(self, choice: Json) -> Json:
        """A choice with what is known of its prompt."""
        return {**choice, **self._version}

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._head(self.chunk_name), "choices": [self._placed(choice)]}
        return {**chunk, "usage": self._used_by(choice["index"])} if self._draft.include_usage else chunk

    def _used_by(self, index: int) -> Json | None:
        """What an output has used so far, where each chunk is to say it."""
        if not self._draft.continuous_usage:
            return None
        prompt, completion = self._prompt_tokens, self._completion_tokens[index]
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _opening(self, index: int) -> Iterator[Json]:
        if index not in self._begun:
            self._begun.add(index)
            yield from (self._chunk(choice) for choice in self._first(index))

    def _ids(self, said: Said) -> Json:
        return {"token_ids": list(said.token_ids)} if said.token_ids and not self._draft.hides_token_ids else {}

    def _named(self, tokens: Sequence[TokenLogprob]) -> Sequence[TokenLogprob]:
        """The tokens by the names that were asked for: their texts, or their ids."""
        if self._draft.spells_token_ids:
            for token in tokens:
                token.text = f"token_id:{token.token_id}"
                for likely in token.top:
                    likely.text = f"token_id:{likely.token_id}"
        return tokens

    def _first(self, index: int) -> Iterator[Json]:
        """What comes before anything else of an output."""
        return iter(())

    def _whole(self, index: int, number: int, output: GenerateOutput, response: GenerateResponse) -> Json:
        """A choice. `number`: of the prompt."""
        raise NotImplementedError

    def _part(self, index: int, delta: Delta) -> Json:
        raise NotImplementedError

    def _nothing(self, index: int) -> Json:
        """A choice to which nothing is added."""
        raise NotImplementedError


class ChatAnswers(Choices):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self._calls = Counter[int]()  # of tools, by output

    def _head(self, name: str) -> Json:
        ids, self._prompt_ids = self._prompt_ids, {}  # once, at the top: it has one prompt
        return {**super()._head(name), **ids}

    def _whole(self, index: int, number: int, output: GenerateOutput, response: GenerateResponse) -> Json:
        message: Json = {"role": "assistant", "content": output.text or (None if output.tool_calls else "")}
        message |= self._reasoning(output.reasoning)
        if output.tool_calls:
            message["tool_calls"] = [_call(call) for call in output.tool_calls]
        choice = {"index": index, "message": message, "logprobs": _chat_logprobs(self._named(output.logprobs))}
        return {**choice, **finish(output.finished), **self._ids(output), **_prompt_logprobs(response.prompt_logprobs)}

    def _first(self, index: int) -> Iterator[Json]:
        yield {**self._nothing(index), "delta": {"role": "assistant", "content": ""}}

    def _part(self, index: int, delta: Delta) -> Json:
        said = {**({"content": delta.text} if delta.text else {}), **self._reasoning(delta.reasoning)}
        if delta.tool_calls:
            said["tool_calls"] = [{"index": self._next_call(index), **_call(call)} for call in delta.tool_calls]
        logprobs = _chat_logprobs(self._named(delta.logprobs))
        return {**self._nothing(index), "delta": said, "logprobs": logprobs, **self._ids(delta)}

    def _nothing(self, index: int) -> Json:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}

    def _next_call(self, index: int) -> int:
        self._calls[index] += 1
        return self._calls[index] - 1

    def _reasoning(self, text: str) -> Json:
        return {"reasoning_content": text} if text and self._draft.include_reasoning else {}


class TextAnswers(Choices):
    """Of /v1/completions. `echoes`: what comes back in front of the outputs of each prompt; empty: nothing."""

    prefix = "cmpl-"
    object_name = chunk_name = "text_completion"

    def __init__(self, draft: Draft, echoes: Sequence[str] = ()) -> None:
        super().__init__(draft)
        self._echoes = echoes
        self._prompt: Sequence[TokenLogprob] = ()  # of the prompt that a stream answers
        self._offsets = defaultdict[int, TextOffsets](TextOffsets)  # by output

    def chunks(self, message: StreamGenerateResponse) -> Iterator[Json]:
        if message.WhichOneof("event") == "prompt_logprobs":
            self._prompt = [*self._prompt, *message.prompt_logprobs.logprobs]
        yield from super().chunks(message)

    def _whole(self, index: int, number: int, output: GenerateOutput, response: GenerateResponse) -> Json:
        echo = self._echoes[number] if self._echoes else ""
        shown = [*(response.prompt_logprobs if echo else ()), *(output.logprobs if self._asked else ())]
        text = echo + output.text
        choice = {"index": index, "text": text, "logprobs": self._logprobs(index, text, shown)}
        prompt = {} if echo else _prompt_logprobs(response.prompt_logprobs)
        return {**choice, **finish(output.finished), **self._ids(output), **prompt, **self._prompt_ids}

    @property
    def _asked(self) -> bool:
        return bool(self._draft.message.output.logprobs)

    def _first(self, index: int) -> Iterator[Json]:
        if self._echoes or self._prompt_ids:
            text = self._echoes[0] if self._echoes else ""
            logprobs = self._logprobs(index, text, self._prompt if self._echoes else ())
            yield {**self._nothing(index), "text": text, "logprobs": logprobs, **self._prompt_ids}

    def _part(self, index: int, delta: Delta) -> Json:
        logprobs = self._logprobs(index, delta.text, delta.logprobs)
        return {**self._nothing(index), "text": delta.text, "logprobs": logprobs, **self._ids(delta)}

    def _nothing(self, index: int) -> Json:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def _logprobs(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self._asked:
            return None
        offsets = self._offsets[index].of(text, tokens)
        if not tokens:
            return None
        return {
            "tokens": [token.text for token in self._named(tokens)],
            "token_logprobs": [_logprob(token) for token in tokens],
            "top_logprobs": [_likeliest(token) for token in tokens],
            "text_offset": offsets,
        }


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}


def _logprob(token: TokenLogprob) -> float | None:
    return max(token.logprob, LEAST_LOGPROB) if token.HasField("logprob") else None


def _likeliest(token: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens and the token itself; None: the first token of a prompt."""
    own = _logprob(token)
    if own is None:
        return None
    return {**{top.text: max(top.logprob, LEAST_LOGPROB) for top in token.top}, token.text: own}


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> Json | None:
    return {"content": spelt_logprobs(tokens)} if tokens else None


def spelt_logprobs(tokens: Sequence[TokenLogprob]) -> list[msgspec.Raw]:
    """Tokens with their log-probabilities, as OpenAI's newer APIs have them: each as the JSON that is sent."""
    return [msgspec.Raw(msgspec.json.encode(_with_likeliest(token))) for token in tokens]


def _with_likeliest(token: TokenLogprob) -> Json:
    likeliest = [_spelt(top.text, max(top.logprob, LEAST_LOGPROB), top.bytes) for top in token.top]
    return {**_spelt(token.text, _logprob(token), token.bytes), "top_logprobs": likeliest}


def _spelt(text: str, logprob: float | None, raw: bytes) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _prompt_logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    """As vLLM has them: for each token of the prompt the likeliest ones and itself, by id."""
    return {"prompt_logprobs": [_by_id(token) for token in tokens]} if tokens else {}


def _by_id(token: TokenLogprob) -> Json | None:
    own = _logprob(token)
    if own is None:
        return None
    found: Json = {}
    for place, top in enumerate(token.top, 1):
        logprob = max(top.logprob, LEAST_LOGPROB)
        found[str(top.token_id)] = {"logprob": logprob, "rank": place, "decoded_token": top.text}
    rank = token.rank if token.HasField("rank") else None
    found.setdefault(str(token.token_id), {"logprob": own, "rank": rank, "decoded_token": token.text})
    return found
