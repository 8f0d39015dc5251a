"""One admitted request without a next token: its prompts in the engine, and what became of each."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from loraplex.v1.inference_pb2 import Timings, Usage
from loraplex.v1.pooling_pb2 import RunReport
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import AddRequest, RequestOutput
from loraplex_engine.link.requests import Generation
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_service.errors import Unavailable
from loraplex_service.requests.accounting import request_record
from loraplex_service.requests.succession import Succession, engine_failure
from loraplex_service.telemetry.records import GenerationRecord
from loraplex_service.timestamps import duration


@dataclass(frozen=True, slots=True)
class PoolingJob:
    """All that is decided before the engine sees the request. Times are the event loop's."""

    request_id: str  # the id that the caller sees; the engine's ids are in `prompts`
    client_request_id: str
    labels: Mapping[str, str]
    operation: str  # the operation's name in telemetry
    tenant: str
    target: ResolvedTarget
    adapter: AdapterKey | None
    prompts: Sequence[AddRequest]  # at least one
    at_once: int  # how many of them the engine has at a time
    arrival: float
    adapter_load_seconds: float  # waited for already


class PoolingRun:
    """Gives the prompts of a job to the engine, a few at a time, and gathers what it makes of them."""

    def __init__(
        self,
        job: PoolingJob,
        client: EngineClient,
        successor: Callable[[], Awaitable[EngineClient]],
        start: Callable[[], None],
    ) -> None:
        """`successor`: as in Succession. `start`: called at the first result. `close` must follow."""
        self._job = job
        self._engines = Succession(job.request_id, client, successor, job.adapter)
        self._start = start
        self._results: list[RequestOutput | None] = [None] * len(job.prompts)
        self._timings = Timings()
        self._computed = False  # a step has worked for it
        self._submitted = asyncio.get_running_loop().time()
        self._places: dict[int, int] = {}  # of what the engine has now, by its ids
        self._waiting = deque(range(len(job.prompts)))
        self._generation: Generation = client.requests.generate()
        self._submit()

    def usage(self) -> Usage:
        """The tokens consumed so far: of the prompts that an engine was sent."""
        done = [(place, output) for place, output in enumerate(self._results) if output is not None]
        sent = [*self._places.values(), *(place for place, _ in done)]
        return Usage(
            prompt_tokens=sum(len(self._job.prompts[place].prompt_token_ids) for place in sent),
            cached_prompt_tokens=sum(output.num_cached_tokens for _, output in done),
        )

    def record(self, status: str, trace_id: str) -> GenerationRecord:
        return request_record(self._job, status, trace_id, self.usage(), self._timings, self._computed)

    def report(self) -> RunReport:
        """What the caller is told, once all results are here."""
        self._timings.total_duration.CopyFrom(duration(asyncio.get_running_loop().time() - self._job.arrival))
        return RunReport(
            request_id=self._job.request_id,
            target=self._job.target,
            usage=self.usage(),
            timings=self._timings,
            client_request_id=self._job.client_request_id,
            labels=self._job.labels,
        )

    def end(self, error: Exception) -> None:
        self._engines.end(error)
        self._generation.end(error)

    def close(self) -> None:
        self._generation.close()

    async def results(self) -> list[bytes]:
        """What became of each prompt, in order: `RequestOutput.pooled`.

        Raises EngineError, what `unusable_adapter` returns, the engine's error, and the one given to `end`.
        """
        while self._places:
            try:
                output = await anext(self._generation)
            except Unavailable as lost:
                if not self._engines.outlives(lost):
                    raise
                await self._go_on()
            else:
                self._take(output)
        return [output.pooled for output in self._results if output is not None]

    def _submit(self) -> None:
        """Fill the job's share of the engine."""
        while self._waiting and len(self._places) < self._job.at_once:
            place = self._waiting.popleft()
            request_id = self._engines.client.requests.new_id()
            self._places[request_id] = place
            self._generation.add(msgspec.structs.replace(self._job.prompts[place], request_id=request_id))

    def _take(self, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            raise engine_failure(self._job.request_id, self._job.target, output)
        self._results[self._places.pop(output.request_id)] = output
        if not self._computed:
            self._note_start(output)
        self._submit()

    def _note_start(self, output: RequestOutput) -> None:
        self._computed = True
        self._start()
        begun = self._submitted + (output.queue_seconds or 0.0)
        self._timings.queue_duration.CopyFrom(duration(begun - self._job.arrival))
        load_seconds = self._job.adapter_load_seconds + output.adapter_load_seconds
        if load_seconds > 0:
            self._timings.adapter_load_duration.CopyFrom(duration(load_seconds))

    async def _go_on(self) -> None:
        """Have the next engine compute what the one that died had not."""
        client = await self._engines.next()
        self._waiting.extendleft(sorted(self._places.values(), reverse=True))
        self._places.clear()
        self._generation = client.requests.generate()
        self._submit()
