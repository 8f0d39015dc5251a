"""The requests that one engine computes: they go out, and their outputs come back as one stream per caller."""

import asyncio
import itertools
from collections.abc import Iterable
from types import TracebackType

from loraplex_engine.link.connection import Connection
from loraplex_engine.link.messages import Abort, AddRequest, RequestOutput

# A caller that lets this many tokens wait has stopped reading: at 100 tokens a second it is 80 seconds behind.
MAX_PENDING_TOKENS = 8192


class SlowConsumerError(Exception):
    """The caller of `generate` fell too far behind. Its sequences are aborted."""

    def __init__(self, pending_tokens: int) -> None:
        super().__init__(f"{pending_tokens} tokens wait to be read")
        self.pending_tokens = pending_tokens


class EngineRequests:
    """Sends requests to one engine and hands each caller its own outputs."""

    def __init__(self, connection: Connection, max_pending_tokens: int) -> None:
        self._connection = connection
        self._max_pending_tokens = max_pending_tokens
        self._ids = itertools.count(1)
        self._generations: dict[int, Generation] = {}  # by request id, until the engine finished it

    @property
    def num_unfinished(self) -> int:
        """Sequences sent and not finished."""
        return len(self._generations)

    def new_id(self) -> int:
        """A request id that is new to this engine."""
        return next(self._ids)

    def generate(self, *requests: AddRequest) -> "Generation":
        """Start these sequences and return their outputs, interleaved as they come. Use the result in a `with`.

        Raises the error with which the engine ended.
        """
        self._connection.check()
        generation = Generation(self, self._max_pending_tokens)
        for request in requests:
            generation.add(request)
        return generation

    def send(self, request: AddRequest, generation: "Generation") -> None:
        """Start one sequence, whose outputs go to this generation."""
        for output_id in request.output_ids:
            assert output_id not in self._generations, "request ids come from new_id, each used once"
            self._generations[output_id] = generation
        self._connection.send(request)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Have the engine forget these requests. Those that finished already, or never were, are passed over.

        A `Generation` does this by itself when it is closed. This method does not end the iteration of its reader.
        """
        running = [request_id for request_id in request_ids if self._generations.pop(request_id, None)]
        if running and self._connection.error is None:
            self._connection.send(Abort(running))

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Take the outputs of one step. Those that nobody waits for any more are dropped."""
        for output in outputs:
            generation = self._generations.get(output.request_id)
            if generation is None:  # aborted while the output was on its way
                continue
            if output.finish_reason is not None:
                del self._generations[output.request_id]
            generation.push(output)

    def fail(self, error: Exception) -> None:
        """End every stream with this error."""
        for generation in set(self._generations.values()):
            generation.end(error)


class Generation:
    """The outputs of sequences that run together, as they come, until each has finished.

    An asynchronous iterator; waiting for the next output may be cancelled or timed out without losing any. While the
    reader is busy, what comes for one sequence is merged into one output. Leaving the `with` aborts what still runs.
    """

    def __init__(self, requests: EngineRequests, max_pending_tokens: int) -> None:
        self._requests = requests
        self._running: set[int] = set()
        self._max_pending_tokens = max_pending_tokens
        self._pending: dict[int, list[RequestOutput]] = {}  # in the order in which they are handed out
        self._num_pending_tokens = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises SlowConsumerError, or the error that ended the engine."""
        while not self._pending:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if not self._running:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        request_id = next(iter(self._pending))
        output = _merge(self._pending.pop(request_id))
        self._num_pending_tokens -= len(output.token_ids)
        return output

    def add(self, request: AddRequest) -> None:
        """Start one more sequence."""
        self._running.update(request.output_ids)
        self._requests.send(request, self)

    def abort(self, request_id: int) -> None:
        """End one sequence, and drop its unread outputs. The others go on."""
        self._running.discard(request_id)
        for output in self._pending.pop(request_id, ()):
            self._num_pending_tokens -= len(output.token_ids)
        self._requests.abort([request_id])

    def close(self) -> None:
        """End all sequences that still run. Closing twice is harmless."""
        running, self._running = self._running, set()
        self._pending.clear()
        self._requests.abort(running)
        self._changed.set()

    def end(self, error: Exception) -> None:
        """End all sequences that still run, and have the reader get this error next."""
        self._error = error
        self.close()

    def push(self, output: RequestOutput) -> None:
        """Take one output for the reader. A reader too far behind gets SlowConsumerError next."""
        if output.finish_reason is not None:
            self._running.discard(output.request_id)
        self._pending.setdefault(output.request_id, []).append(output)
        self._num_pending_tokens += len(output.token_ids)
        self._changed.set()
        if self._num_pending_tokens > self._max_pending_tokens:
            self.end(SlowConsumerError(self._num_pending_tokens))


def _merge(outputs: list[RequestOutput]) -> RequestOutput:
    """Merge the outputs of one sequence from several steps."""
    if len(outputs) == 1:
        return outputs[0]
    first, last = outputs[0], outputs[-1]
    logprobs = [position for output in outputs for position in output.logprobs or ()]
    return RequestOutput(
        request_id=first.request_id,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        logprobs=logprobs or None,
        score=last.score,
        num_searched=sum(output.num_searched for output in outputs),
        num_drafts=sum(output.num_drafts for output in outputs),
        num_accepted_drafts=sum(output.num_accepted_drafts for output in outputs),
        prompt_logprobs=next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), None),
        num_cached_tokens=first.num_cached_tokens,
        queue_seconds=first.queue_seconds,
        adapter_load_seconds=first.adapter_load_seconds,
        error=last.error,
        error_reason=last.error_reason,
        pooled=last.pooled,
    )
