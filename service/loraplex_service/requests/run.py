"""One admitted request: its sequences in the engine, and the events that its caller sees.

When the engine dies, its requests go on with the next engine from the tokens that they have: the caller sees one stream
without a gap, and no token twice. A drawn token is a function of the tokens and the seed. With kernels that are not
batch-invariant, near ties are the exception: there the last bits of a row decide.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from loraplex.v1 import inference_pb2
from loraplex.v1.inference_pb2 import Completed, Delta, Finished, PromptLogprobs, Started, Timings, Usage
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.grammar import UNUSABLE_FORM
from loraplex_engine.link.messages import AddRequest, RequestOutput, TokenLogprobs
from loraplex_engine.link.requests import Generation, SlowConsumerError
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_service.errors import InvalidRequest, LoraplexError, SlowConsumer, Unavailable
from loraplex_service.requests.accounting import request_record
from loraplex_service.requests.output_form import OutputForm
from loraplex_service.requests.outputs import OutputBuilder, prompt_logprobs
from loraplex_service.requests.ranking import to_send
from loraplex_service.requests.succession import Succession, engine_failure
from loraplex_service.telemetry.records import GenerationRecord
from loraplex_service.telemetry.series import Distribution
from loraplex_service.text import Message, Tokenizer
from loraplex_service.timestamps import duration

Event = Started | PromptLogprobs | Delta | Finished | Completed


@dataclass(frozen=True, slots=True)
class Job:
    """All that is decided before the engine sees the request. Times are the event loop's."""

    request_id: str  # the id that the caller sees; the engine's ids are in `sequences`
    client_request_id: str
    labels: Mapping[str, str]
    operation: str  # the operation's name in telemetry: chat, text_completion
    target: ResolvedTarget
    tokenizer: Tokenizer
    form: OutputForm
    prompt: Sequence[int]  # its token ids
    sequences: Sequence[AddRequest]  # one for each output, all with this prompt, and perhaps more behind it
    arrival: float
    adapter_load_seconds: float  # waited for already
    constraint: str  # the kind of the form that its outputs have; empty: none
    num_ranked: int | None  # outputs that come back, the best, once all have ended; None: all, as they come
    form_path: str  # where the request says what form its outputs must have
    messages: Sequence[Message] | None = None  # that read the outputs; None: they are plain text

    @property
    def tenant(self) -> str:
        return self.sequences[0].tenant

    @property
    def adapter(self) -> AdapterKey | None:
        return self.sequences[0].adapter

    @property
    def num_prompt_tokens(self) -> int:
        """The tokens that are read: those of the prompt once, and what each sequence has behind it."""
        return len(self.prompt) + sum(len(each.prompt_token_ids) - len(self.prompt) for each in self.sequences)


@dataclass(slots=True)
class _Sequence:
    """One output: the request to the engine, and the tokens received so far."""

    request: AddRequest
    builder: OutputBuilder
    awaits_prompt_logprobs: bool
    token_ids: list[int] = field(default_factory=list)  # generated, whether or not the caller has seen them
    scored: Sequence[TokenLogprobs] = ()  # what it has behind the prompt
    last_token: float | None = None  # the time of the last token
    logprob: float = 0.0  # the sum over its tokens, where it is ranked by their mean
    num_summed: int = 0  # of its tokens
    score: float | None = None  # that a search gave it

    def rank(self, output: RequestOutput) -> None:
        """Take into account what the builder has got."""
        self.score = output.score
        count, self.num_summed = self.builder.num_tokens - self.num_summed, self.builder.num_tokens
        self.logprob += sum(entry.logprob for entry in (output.logprobs or ())[:count])

    def ranked_by(self) -> float:
        """What it is ranked by: the higher the better."""
        if self.score is not None:
            return self.score
        return self.logprob / self.builder.num_tokens if self.builder.num_tokens else -math.inf


class Run:
    """Turns the engine's outputs for a job into Started, PromptLogprobs*, (Delta | Finished)*, Completed."""

    def __init__(
        self,
        job: Job,
        client: EngineClient,
        successor: Callable[[], Awaitable[EngineClient]],
        token_gaps: Distribution,
        start: Callable[[], None],
    ) -> None:
        """Hand the sequences to the engine. `close` must follow.

        `successor`: waits for the next engine after one has died, until it holds the job's adapter; raises what the
        caller is told if none comes. `token_gaps`: observes the seconds between tokens. `start`: called at the first
        token.
        """
        self._job = job
        self._prompt = job.prompt
        messages: Sequence[Message | None] = job.messages or [None] * len(job.sequences)
        self._sequences = [
            _Sequence(
                request,
                OutputBuilder(index, job.form, job.tokenizer, self._prompt, message),
                request.sampling.num_prompt_logprobs is not None,
            )
            for index, (request, message) in enumerate(zip(job.sequences, messages, strict=True))
        ]
        self._open = {sequence.request.request_id: sequence for sequence in self._sequences}  # Finished not sent yet
        self._timings = Timings()
        self._cached_tokens = 0
        self._draft_tokens = self._accepted_draft_tokens = 0
        self._searched_tokens = 0
        self._found: list[RequestOutput] = []  # of a search that has ended, as long as some are missing
        self._started = False
        self._computed = False  # a step has worked for it
        self._has_token = False
        self._submitted = asyncio.get_running_loop().time()
        limit = job.sequences[0].sampling.time_limit_seconds
        self._ends_at = None if limit is None else self._submitted + limit
        self._is_over = limit == 0  # before an engine could begin
        self._engines = Succession(job.request_id, client, successor, job.adapter)
        self._generation: Generation = client.requests.generate(*(() if self._is_over else to_send(job.sequences)))
        self._token_gaps = token_gaps
        self._tell_started = start

    def usage(self) -> Usage:
        """The tokens consumed so far."""
        return Usage(
            prompt_tokens=self._job.num_prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            completion_tokens=self._searched_tokens or sum(each.builder.num_tokens for each in self._sequences),
            draft_tokens=self._draft_tokens,
            accepted_draft_tokens=self._accepted_draft_tokens,
        )

    def record(self, status: str, trace_id: str) -> GenerationRecord:
        """The generation's record. `status`: the name of the gRPC status that it ends with."""
        finished = [each.builder.finished for each in self._sequences if each.builder.finished is not None]
        reasons = [inference_pb2.FinishReason.Name(f.reason).removeprefix("FINISH_REASON_") for f in finished]
        record = request_record(self._job, status, trace_id, self.usage(), self._timings, self._computed, reasons)
        return msgspec.structs.replace(record, constraint=self._job.constraint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its text."""
        return self._job.tokenizer

    def take_scored(self, index: int) -> Sequence[TokenLogprobs]:
        """What a sequence that has finished has behind the prompt, with its log-probabilities. The run forgets it."""
        sequence = self._sequences[index]
        scored, sequence.scored = sequence.scored, ()
        return scored

    def end(self, error: Exception) -> None:
        """Stop the engine's work at once, and make `events` raise this error."""
        self._engines.end(error)
        self._generation.end(error)

    def close(self) -> None:
        """Stop the engine's work, if it has not ended."""
        self._generation.close()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield all events, in order.

        Raises EngineError, SlowConsumer, InvalidRequest for a form that cannot be kept to, what `unusable_adapter`
        returns, the engine's error, and the one given to `end`.
        """
        loop = asyncio.get_running_loop()
        flush_at: float | None = None  # when the first of the held tokens has been held long enough
        if self._is_over:
            for event in self._end_at_time_limit():
                yield event
        while self._open:
            try:
                output = await self._next(flush_at)
            except TimeoutError:
                flush_at = None
                for event in self._take(everything=True):
                    yield event
                continue
            except SlowConsumerError as error:
                raise SlowConsumer(f"the stream is read too slowly: {error}. Read faster, or ask for fewer") from error
            except Unavailable as lost:
                if not self._engines.outlives(lost):
                    raise
                for event in self._take(everything=True):  # the caller need not wait for outputs that have arrived
                    yield event
                try:
                    async with asyncio.timeout_at(self._ends_at):
                        await self._resume()
                except TimeoutError:
                    for event in self._end_at_time_limit():
                        yield event
                continue
            for event in self._begun(output):
                yield event
            sequence = self._open[output.request_id]
            if sequence.builder.takes_long(output):
                await asyncio.to_thread(sequence.builder.push, output)
            else:
                sequence.builder.push(output)
            for event in self._pushed(output):
                yield event
            if not self._job.form.chunk_delay_seconds < float("inf") or not self._holds_tokens():
                flush_at = None
            elif flush_at is None:
                flush_at = loop.time() + self._job.form.chunk_delay_seconds
        yield self._completed()

    async def _next(self, flush_at: float | None) -> RequestOutput:
        """The engine's next output. Raises TimeoutError at `flush_at`."""
        if flush_at is None:  # most of the time; a timeout that never comes costs as much as one that does
            return await self._next_output()
        async with asyncio.timeout_at(flush_at):
            return await self._next_output()

    async def _next_output(self) -> RequestOutput:
        """The engine's next output. What a search has found comes when all of it has: no engine can die in between."""
        while self._job.sequences[0].beams is not None:
            num_ended = sum(sequence.builder.finished is not None for sequence in self._sequences)
            if self._found and len(self._found) + num_ended == len(self._sequences):
                return self._found.pop(0)
            output = await anext(self._generation)
            if output.finish_reason in (None, FinishReason.ERROR):
                return output
            self._found.append(output)
        return await anext(self._generation)

    async def _resume(self) -> None:
        """Go on with the next engine. Tokens of the old one that were not read yet are generated again."""
        client = await self._engines.next()
        self._found.clear()  # a search begins anew
        self._searched_tokens = 0
        for sequence in self._open.values():  # each engine counts its requests anew
            sequence.request = self._continued(sequence, client.requests.new_id())
        self._open = {sequence.request.request_id: sequence for sequence in self._open.values()}
        unfinished = [sequence.request for sequence in self._open.values() if sequence.builder.finished is None]
        self._generation = client.requests.generate(*to_send(unfinished))

    def _continued(self, sequence: _Sequence, request_id: int) -> AddRequest:
        """The request for the rest of an output."""
        sampling = sequence.request.sampling
        if not sequence.awaits_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, num_prompt_logprobs=None)
        if self._ends_at is not None:
            left = max(self._ends_at - asyncio.get_running_loop().time(), 0.0)
            sampling = msgspec.structs.replace(sampling, time_limit_seconds=left)
        return msgspec.structs.replace(
            sequence.request,
            request_id=request_id,
            sampling=sampling,
            output_token_ids=sequence.token_ids,
            adapter_wait_seconds=None,  # the caller's own limit began at its arrival
        )

    def _begun(self, output: RequestOutput) -> Iterator[Event]:
        """The events that come before those of the output's tokens. Raises what `_failure` returns."""
        if output.finish_reason is FinishReason.ERROR:
            raise self._failure(output)
        if output.token_ids and not self._has_token:
            self._has_token = True
            seconds = asyncio.get_running_loop().time() - self._job.arrival
            self._timings.time_to_first_token.CopyFrom(duration(seconds))
        if not self._started:
            yield self._start(output)
        sequence = self._open[output.request_id]
        sequence.awaits_prompt_logprobs = False  # they come with its first output, or never
        if output.prompt_logprobs is not None:
            if sequence.request.sampling.prompt_logprobs_from:
                sequence.scored = [entry for entry in output.prompt_logprobs if entry is not None]
            else:
                yield from prompt_logprobs(output.prompt_logprobs, self._prompt, self._job.tokenizer)
        self._draft_tokens += output.num_drafts
        self._accepted_draft_tokens += output.num_accepted_drafts

    def _pushed(self, output: RequestOutput) -> Iterator[Event]:
        """The events that are due once the output's builder has it."""
        sequence = self._open[output.request_id]
        sequence.token_ids += output.token_ids
        self._searched_tokens += output.num_searched
        if self._job.num_ranked is not None:
            sequence.rank(output)
        if output.token_ids and output.score is None:
            self._observe_gaps(sequence, len(output.token_ids))
        # A stop string, or the only call: the engine does not know of it.
        if sequence.builder.finished is not None and output.finish_reason is None:
            self._generation.abort(output.request_id)
        yield from self._take(everything=False)

    def _failure(self, output: RequestOutput) -> LoraplexError:
        if output.error_reason == UNUSABLE_FORM:
            return InvalidRequest.at(self._job.form_path, output.error)
        return engine_failure(self._job.request_id, self._job.target, output)

    def _end_at_time_limit(self) -> Iterator[Event]:
        """End the outputs as an engine would at the time limit, while no engine has the request."""
        for request_id, sequence in list(self._open.items()):
            if sequence.builder.finished is None:
                output = RequestOutput(request_id, [], FinishReason.TIME_LIMIT)
                yield from self._begun(output)
                sequence.builder.push(output)
                yield from self._pushed(output)

    def _observe_gaps(self, sequence: _Sequence, num_tokens: int) -> None:
        """Tokens that come together share the time since the one before; before the first there is no gap."""
        now = asyncio.get_running_loop().time()
        if sequence.last_token is not None:
            self._token_gaps.observe((now - sequence.last_token) / num_tokens, num_tokens)
        elif num_tokens > 1:
            self._token_gaps.observe(0.0, num_tokens - 1)
        sequence.last_token = now

    def _start(self, output: RequestOutput) -> Started:
        job = self._job
        self._started = True
        self._tell_started()
        self._cached_tokens = output.num_cached_tokens
        if output.queue_seconds is None:
            begun = asyncio.get_running_loop().time()  # it ended without having run: all of its time was waiting
        else:
            begun = self._submitted + output.queue_seconds
            self._computed = True
        self._timings.queue_duration.CopyFrom(duration(begun - job.arrival))
        load_seconds = job.adapter_load_seconds + output.adapter_load_seconds
        if load_seconds > 0:
            self._timings.adapter_load_duration.CopyFrom(duration(load_seconds))
        started = Started(
            request_id=job.request_id,
            client_request_id=job.client_request_id,
            labels=job.labels,
            target=job.target,
            prompt_tokens=self._job.num_prompt_tokens,
            cached_prompt_tokens=output.num_cached_tokens,
            queue_duration=self._timings.queue_duration,
            prompt_token_ids=self._prompt if job.form.prompt_token_ids else (),
        )
        if load_seconds > 0:
            started.adapter_load_duration.CopyFrom(self._timings.adapter_load_duration)
        return started

    def _take(self, everything: bool) -> Iterator[Event]:
        """The events that are due: of outputs that ended or hold enough tokens.

        The prompt's log-probabilities come first.
        """
        if self._sequences[0].awaits_prompt_logprobs:
            return
        if self._job.num_ranked is not None:
            yield from self._take_best(self._job.num_ranked)
            return
        for request_id, sequence in list(self._open.items()):
            builder = sequence.builder
            if not everything and builder.finished is None and builder.num_held_tokens < self._job.form.chunk_tokens:
                continue
            delta = builder.take()
            if delta is not None:
                yield delta
            if builder.finished is not None:
                del self._open[request_id]
                yield builder.finished

    def _take_best(self, count: int) -> Iterator[Event]:
        """The best outputs, the best first, once all have ended."""
        if any(sequence.builder.finished is None for sequence in self._sequences):
            return
        self._open.clear()
        ranked = sorted(self._sequences, key=lambda sequence: -sequence.ranked_by())
        found = [sequence for sequence in ranked[:count] if sequence.score != -math.inf]  # a search may find fewer
        for index, sequence in enumerate(found or ranked[:1]):
            yield from sequence.builder.ranked(index, sequence.ranked_by())

    def _holds_tokens(self) -> bool:
        return any(sequence.builder.num_held_tokens for sequence in self._open.values())

    def _completed(self) -> Completed:
        self._timings.total_duration.CopyFrom(duration(asyncio.get_running_loop().time() - self._job.arrival))
        completed = Completed(usage=self.usage(), timings=self._timings)
        sampling = self._job.sequences[0].sampling
        if not sampling.greedy and sampling.max_tokens > 0:
            completed.seed = sampling.seed
        return completed
