"""The requests of a benchmark, sent to the HTTP port of a Loraplex server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.workload import Work
from loraplex_service.bench.doors import HttpStreams, completion_body
from loraplex_service.bench.loops import drive
from loraplex_service.bench.records import Record


class HttpClient:
    """A connection for each stream."""

    def __init__(self, host: str, port: int) -> None:
        self._streams = HttpStreams(host, port)

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        model = "bench" if work.adapter is None else f"a{work.adapter:02d}"
        sampling = {"temperature": work.temperature, "top_p": work.top_p, "seed": work.seed}
        return await self._streams.stream(completion_body(model, work.prompt, work.output, **sampling), on_tokens)

    async def run(self, work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        return await drive(self.generate, work, concurrency)
