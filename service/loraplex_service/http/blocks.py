"""An output as blocks that follow each other: what the model thinks, what it says, and each tool that it calls."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from loraplex.v1.inference_pb2 import (
    Delta,
    Finished,
    GenerateOutput,
    GenerateResponse,
    Started,
    StreamGenerateResponse,
    TokenLogprob,
    Usage,
)
from loraplex.v1.prompt_pb2 import ToolCall
from loraplex_service.http.answers import Answers, Json, spelt_logprobs
from loraplex_service.http.parameters import Draft

REASONING, TEXT, CALL = "reasoning", "text", "call"


@dataclass(slots=True)
class Block:
    """One block, as far as it has come."""

    kind: str
    index: int
    text: str = ""  # of a call: its arguments
    call: ToolCall | None = None
    logprobs: list[msgspec.Raw] = field(default_factory=list)  # as they are told, again and again


class BlockAnswers(Answers):
    """The answer to a request that has one output, for an API that tells it as blocks."""

    last = b""  # the events themselves say which is the last

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self._blocks: list[Block] = []
        self._open: Block | None = None
        self._waiting: list[TokenLogprob] = []  # of tokens whose text is not there yet
        self._started = Started()
        self._finished = Finished()

    def whole(self, responses: Sequence[GenerateResponse]) -> Json:
        [response] = responses
        [output] = response.outputs
        self._meet(response.request_id)
        self._finished = output.finished
        for _ in (*self._add(output), *self._close()):
            """The blocks are what is wanted here, and not their events."""
        return self._message(response.usage)

    def chunks(self, message: StreamGenerateResponse) -> Iterator[Json]:
        match message.WhichOneof("event"):
            case "started":
                self._started = message.started
                self._meet(message.started.request_id)
                yield from self._begin()
            case "delta":
                yield from self._add(message.delta)
            case "finished":
                self._finished = message.finished
                yield from self._close()
            case "completed":
                yield from self._end(message.completed.usage)

    def _add(self, said: Delta | GenerateOutput) -> Iterator[Json]:
        self._waiting += said.logprobs
        if said.reasoning:
            self._take(said.reasoning, others=bool(said.text))
            if self._draft.include_reasoning:
                yield from self._grow(REASONING, said.reasoning, ())
        if said.text:
            yield from self._grow(TEXT, said.text, spelt_logprobs(self._take(said.text)))
        for call in said.tool_calls:
            yield from self._close()
            yield from self._new(CALL, call)
            yield from self._grow(CALL, call.arguments_json, ())
            yield from self._close()

    def _take(self, text: str, others: bool = False) -> Sequence[TokenLogprob]:
        """Take the tokens of a text from those that wait. Marks before it are dropped.

        Where none spell it, as of a text that was cut, all belong to it, but where there are `others` to take some.
        """
        tokens, span = self._waiting, _span(self._waiting, text.encode())
        first, last = span or (0, 0 if others else len(tokens))
        self._waiting = tokens[last:]
        return tokens[first:last]

    def _grow(self, kind: str, text: str, logprobs: Sequence[msgspec.Raw]) -> Iterator[Json]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield from self._new(kind)
        assert self._open is not None
        self._open.text += text
        self._open.logprobs += logprobs
        yield from self._grown(self._open, text, logprobs)

    def _new(self, kind: str, call: ToolCall | None = None) -> Iterator[Json]:
        self._open = Block(kind, len(self._blocks), call=call)
        self._blocks.append(self._open)
        yield from self._opened(self._open)

    def _close(self) -> Iterator[Json]:
        if self._open is not None:
            closed, self._open = self._open, None
            yield from self._closed(closed)

    # ---- the words of the API ----------------------------------------------------------------------------------------

    def _message(self, usage: Usage) -> Json:
        """The whole answer."""
        raise NotImplementedError

    def _begin(self) -> Iterator[Json]:
        """What comes before the first block."""
        raise NotImplementedError

    def _opened(self, block: Block) -> Iterator[Json]:
        raise NotImplementedError

    def _grown(self, block: Block, text: str, logprobs: Sequence[msgspec.Raw]) -> Iterator[Json]:
        raise NotImplementedError

    def _closed(self, block: Block) -> Iterator[Json]:
        raise NotImplementedError

    def _end(self, usage: Usage) -> Iterator[Json]:
        """What comes after the last block."""
        raise NotImplementedError


def _span(tokens: Sequence[TokenLogprob], text: bytes) -> tuple[int, int] | None:
    """The places of the first token of a text and of the first one behind it; None: no tokens spell it."""
    spelt, ends = b"".join(token.bytes for token in tokens), list(accumulate(len(token.bytes) for token in tokens))
    for first, token in enumerate(tokens):
        begins = ends[first] - len(token.bytes)
        for start in (
            (begins, begins + 1) if token.bytes.startswith(b" ") else (begins,)
        ):  # left out where a text begins
            if token.bytes and spelt.startswith(text, start):
                return first, bisect_left(ends, start + len(text)) + 1
    return None
