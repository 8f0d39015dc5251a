"""Turns the tokens of one output into text, log-probabilities and a finish reason for the caller."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from loraplex.v1 import inference_pb2
from loraplex.v1.inference_pb2 import Delta, Finished, PromptLogprobs, TokenLogprob, TopLogprob
from loraplex.v1.prompt_pb2 import ToolCall
from loraplex_engine.link.messages import RequestOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_service.requests.output_form import OutputForm
from loraplex_service.text import IncrementalDetokenizer, Message, PlainMessage, StopStrings, Tokenizer

PROMPT_LOGPROBS_PER_MESSAGE = 256  # 20 likeliest tokens each: about 150 KB


@dataclass(frozen=True, slots=True)
class _Token:
    """A token that is held back: its text could be part of a stop string, or follow one."""

    token_id: int
    logprobs: TokenLogprobs | None
    start: int  # characters of the output before its own


class OutputBuilder:
    """Gathers the engine's results for one output until they are taken as a Delta.

    The last token is the one that holds the text's last character. So with stop strings a token waits until some of its
    own text, or of a later token's, may be sent.
    """

    def __init__(
        self,
        index: int,
        form: OutputForm,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        message: Message | None = None,
    ) -> None:
        """`message`: reads the text; None: it is plain."""
        self.finished: Finished | None = None
        self.num_tokens = 0  # generated so far, the one that ended it included
        self.num_held_tokens = 0  # of these, not taken yet
        self._index = index
        self._form = form
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        if form.text or form.stop:
            is_read = message is not None and form.skip_special_tokens
            pieces = tokenizer.message_pieces if is_read else tokenizer.pieces(form.skip_special_tokens)
            self._detokenizer = IncrementalDetokenizer(pieces, prompt_token_ids)
        self._stops = StopStrings(form.stop, form.include_stop)
        self._num_chars = 0  # of the output's text
        self._num_sent_chars = 0  # of these, not held back by `_stops`
        self._waiting: deque[_Token] = deque()
        self._message: Message = message or PlainMessage()
        self._is_watched = bool(form.stop) or message is not None  # each token's text may end the output
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def takes_long(self, output: RequestOutput) -> bool:
        """Whether to push this may take more than a millisecond."""
        return self._message.takes_long(4 * len(output.token_ids))

    def push(self, output: RequestOutput) -> None:
        """Add the results of one or several steps. Sets `finished` once the output has ended. A stop string ends it
        even if the engine goes on.
        """
        token_ids = output.token_ids
        if output.stop_token_id is not None and not self._form.include_stop:
            token_ids = token_ids[:-1]  # the engine gives the token that ended the output; it counts, and is not shown
        stop = None
        if self._detokenizer is None or not self._is_watched:
            self._push_freely(token_ids, output.logprobs)
        else:
            stop = self._push_watched(self._detokenizer, token_ids, output.logprobs)
        if stop is None and not self._message.is_over:
            self.num_tokens += len(output.token_ids) - len(token_ids)
            if output.finish_reason is not None:
                stop = self._flush()
        if stop is not None:
            self._finish(FinishReason.STOP, stop=stop)
        elif self._message.is_over:
            self._finish(FinishReason.EOS)
        elif output.finish_reason is not None:
            self._finish(output.finish_reason, output.stop_token_id)

    def take(self) -> Delta | None:
        """The Delta gathered since the last call; None: nothing that the caller asked for."""
        part, delta = self._message.take(), Delta(output_index=self._index)
        if self._form.text:
            delta.text, delta.reasoning = part.text, part.reasoning
            delta.tool_calls.extend(
                ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in part.calls
            )
        if self._form.token_ids:
            delta.token_ids.extend(self._token_ids)
        if self._form.logprobs:
            delta.logprobs.extend(token_logprob(entry, self._tokenizer) for entry in self._logprobs)
        self._token_ids.clear()
        self._logprobs.clear()
        self.num_held_tokens = 0
        said = delta.text or delta.reasoning or delta.tool_calls
        return delta if said or delta.token_ids or delta.logprobs else None

    def ranked(self, index: int, score: float) -> Iterator[Delta | Finished]:
        """The whole output, which has ended, as the one with this index among the best."""
        assert self.finished is not None
        self._index = self.finished.output_index = index
        if math.isfinite(score):
            self.finished.score = score
        delta = self.take()
        if delta is not None:
            yield delta
        yield self.finished

    def _push_freely(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        """Add all tokens at once: there are no stop strings to find."""
        if self._detokenizer is not None:
            self._message.feed(self._detokenizer.push(token_ids))
        self.num_tokens += len(token_ids)
        self.num_held_tokens += len(token_ids)
        self._token_ids.extend(token_ids)
        if logprobs is not None:
            self._logprobs.extend(logprobs[: len(token_ids)])

    def _push_watched(
        self, detokenizer: IncrementalDetokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> str | None:
        """Add tokens one at a time, to know which one completes a stop string or ends the message.

        Returns that stop string, or None.
        """
        for position, token_id in enumerate(token_ids):
            self.num_tokens += 1
            self.num_held_tokens += 1
            detail = None if logprobs is None else logprobs[position]
            self._waiting.append(_Token(token_id, detail, self._num_chars))
            text = detokenizer.push((token_id,))
            self._num_chars += len(text)
            stop = self._watch(text)
            if stop is not None or self._message.is_over:
                return stop
        return None

    def _watch(self, text: str) -> str | None:
        """Send the text that is no part of a stop string. Returns the stop string that it completes, or None."""
        result = self._stops.push(text, may_end=self.num_tokens >= self._form.min_tokens)
        self._send(result.text)
        return result.matched

    def _send(self, text: str) -> None:
        """Release text, with the tokens in which it begins."""
        self._message.feed(text)
        self._num_sent_chars += len(text)
        while self._waiting and self._waiting[0].start < self._num_sent_chars:
            self._let_go(self._waiting.popleft())

    def _let_go(self, token: _Token) -> None:
        self._token_ids.append(token.token_id)
        if token.logprobs is not None:
            self._logprobs.append(token.logprobs)

    def _flush(self) -> str | None:
        """Release all that was held back, unless the end of the text completes a stop string.

        Returns that string, or None.
        """
        if self._detokenizer is not None:
            stop = self._watch(self._detokenizer.flush())
            if stop is not None:
                return stop
            self._send(self._stops.flush())
        for token in self._waiting:
            self._let_go(token)
        self._waiting.clear()
        return None

    def _finish(self, reason: FinishReason, stop_token_id: int | None = None, stop: str | None = None) -> None:
        """`stop`: the stop string that ended the output."""
        ended = stop is None and reason in (FinishReason.EOS, FinishReason.STOP)
        self._message.finish(cut_short=not ended)
        if reason is FinishReason.MAX_TOKENS and self._form.fills_context:
            reason = FinishReason.CONTEXT_LIMIT
        name = f"FINISH_REASON_{reason.name}"
        if ended and self._message.num_calls and (reason is FinishReason.EOS or stop_token_id is None):
            name = "FINISH_REASON_TOOL_CALLS"
        self.finished = Finished(
            output_index=self._index,
            reason=inference_pb2.FinishReason.Value(name),
            completion_tokens=self.num_tokens,
        )
        if stop is not None:
            self.finished.stop = stop
        elif reason is FinishReason.STOP and stop_token_id is not None:
            self.finished.stop_token_id = stop_token_id


def token_logprob(entry: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprob:
    return TokenLogprob(
        token_id=entry.token_id,
        text=tokenizer.token_text(entry.token_id),
        bytes=tokenizer.token_bytes(entry.token_id),
        logprob=entry.logprob,
        rank=entry.rank,
        top=[
            TopLogprob(
                token_id=token_id,
                text=tokenizer.token_text(token_id),
                bytes=tokenizer.token_bytes(token_id),
                logprob=logprob,
            )
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ],
        named_logprobs=entry.named_logprobs,
    )


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], prompt_token_ids: Sequence[int], tokenizer: Tokenizer
) -> Iterator[PromptLogprobs]:
    """The prompt's tokens in messages of bounded size, as many as there are entries.

    Nothing predicts the first token: it has no log-probability.
    """
    positions = (
        token_logprob(entry, tokenizer)
        if entry is not None
        else TokenLogprob(token_id=token_id, text=tokenizer.token_text(token_id), bytes=tokenizer.token_bytes(token_id))
        for entry, token_id in zip(entries, prompt_token_ids, strict=False)
    )
    while some := list(islice(positions, PROMPT_LOGPROBS_PER_MESSAGE)):
        yield PromptLogprobs(logprobs=some)
