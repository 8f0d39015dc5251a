"""From the tokens of one output to what the caller gets: text, log-probabilities, and the reason why it ended."""

from collections.abc import Iterator, Sequence

from engine.messages import RequestOutput, TokenLogprobs
from engine.sampling_params import FinishReason
from loraplex.v1 import inference_pb2
from loraplex.v1.inference_pb2 import Delta, Finished, PromptLogprobs, TokenLogprob, TopLogprob
from service.text import IncrementalDetokenizer, StopStrings, Tokenizer
from service.validation import OutputForm

PROMPT_LOGPROBS_PER_MESSAGE = 256  # 20 likeliest tokens each: about 150 KB


class OutputBuilder:
    """Gathers what the engine gives one output, until it is taken as a Delta."""

    def __init__(self, index: int, form: OutputForm, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self.finished: Finished | None = None
        self.num_tokens = 0  # generated so far, the one that ended it included
        self.num_held_tokens = 0  # of these, not taken yet
        self._index = index
        self._form = form
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        if form.text or form.stop:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, form.skip_special_tokens)
        self._stops = StopStrings(form.stop, form.include_stop)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def push(self, output: RequestOutput) -> None:
        """Take what one step, or several, gave. Sets `finished` once the output has ended, by a stop string even where
        the engine goes on.
        """
        token_ids = output.token_ids
        if output.stop_token_id is not None and not self._form.include_stop:
            token_ids = token_ids[:-1]  # the engine gives the token that ended the output; it counts, and is not shown
        matched = self._push_text(token_ids)
        if matched is None:
            self._take_tokens(token_ids, output.logprobs)
            self.num_tokens += len(output.token_ids) - len(token_ids)
            if output.finish_reason is not None:
                self._text.append(self._flush_text())
                self._finish(output.finish_reason, output.stop_token_id)
        else:
            stop, position = matched
            self._take_tokens(token_ids[: position + 1], output.logprobs)
            self._finish(FinishReason.STOP, None)
            assert self.finished is not None
            self.finished.stop = stop

    def take(self) -> Delta | None:
        """What has gathered since the last time; None if there is nothing that the caller asked for."""
        delta = Delta(output_index=self._index)
        if self._form.text:
            delta.text = "".join(self._text)
        if self._form.token_ids:
            delta.token_ids.extend(self._token_ids)
        if self._form.logprobs:
            delta.logprobs.extend(token_logprob(entry, self._tokenizer) for entry in self._logprobs)
        self._text.clear()
        self._token_ids.clear()
        self._logprobs.clear()
        self.num_held_tokens = 0
        return delta if delta.text or delta.token_ids or delta.logprobs else None

    def _push_text(self, token_ids: Sequence[int]) -> tuple[str, int] | None:
        """Decode; with stop strings one token at a time, to know which one completes a match: (stop, its position)."""
        if self._detokenizer is None:
            return None
        if not self._form.stop:
            self._text.append(self._detokenizer.push(token_ids))
            return None
        for position, token_id in enumerate(token_ids):
            text = self._detokenizer.push((token_id,))
            if self.num_tokens + position + 1 < self._form.min_tokens:
                self._text.append(text)
                continue
            result = self._stops.push(text)
            self._text.append(result.text)
            if result.matched is not None:
                return result.matched, position
        return None

    def _flush_text(self) -> str:
        if self._detokenizer is None:
            return ""
        return self._stops.push(self._detokenizer.flush()).text + self._stops.flush()

    def _take_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        self.num_tokens += len(token_ids)
        self.num_held_tokens += len(token_ids)
        self._token_ids.extend(token_ids)
        if logprobs is not None:
            self._logprobs.extend(logprobs[: len(token_ids)])

    def _finish(self, reason: FinishReason, stop_token_id: int | None) -> None:
        if reason is FinishReason.MAX_TOKENS and self._form.fills_context:
            reason = FinishReason.CONTEXT_LIMIT
        self.finished = Finished(
            output_index=self._index,
            reason=inference_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}"),
            completion_tokens=self.num_tokens,
        )
        if reason is FinishReason.STOP and stop_token_id is not None:
            self.finished.stop_token_id = stop_token_id


def token_logprob(entry: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprob:
    return TokenLogprob(
        token_id=entry.token_id,
        text=tokenizer.token_text(entry.token_id),
        logprob=entry.logprob,
        rank=entry.rank,
        top=[
            TopLogprob(token_id=token_id, text=tokenizer.token_text(token_id), logprob=logprob)
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ],
    )


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], prompt_token_ids: Sequence[int], tokenizer: Tokenizer
) -> Iterator[PromptLogprobs]:
    """The prompt's tokens in messages of bounded size, as many as there are entries.

    Nothing predicts the first token: it has no log-probability.
    """
    positions = [
        token_logprob(entry, tokenizer)
        if entry is not None
        else TokenLogprob(token_id=token_id, text=tokenizer.token_text(token_id))
        for entry, token_id in zip(entries, prompt_token_ids, strict=False)
    ]
    for start in range(0, len(positions), PROMPT_LOGPROBS_PER_MESSAGE):
        yield PromptLogprobs(logprobs=positions[start : start + PROMPT_LOGPROBS_PER_MESSAGE])
