"""How much work a model takes on before the service says "later". The only home of that policy."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.messages import ModelLimits
from service.errors import Unavailable


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What may be in flight for one model, running and waiting, as multiples of what can run at once."""

    sequences: float = 4.0  # of max_num_seqs
    cache_tokens: float = 4.0  # of the tokens that the KV cache holds
    expected_output_tokens: int = 512  # outputs count with at most this: few use all that they ask for
    retry_after_seconds: float = 1.0


@dataclass(slots=True)
class _InFlight:
    sequences: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Admission:
    """Counts what is in flight, by model, and refuses what is too much: a bounded queue is a short one.

    For one event loop.
    """

    limits: AdmissionLimits = AdmissionLimits()
    draining: bool = False
    _models: defaultdict[str, _InFlight] = field(default_factory=lambda: defaultdict(_InFlight))
    _num_requests: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    @contextmanager
    def enter(
        self, model: str, limits: ModelLimits, prompt_tokens: int, outputs: int, max_tokens: int
    ) -> Iterator[None]:
        """Hold a place for one request while it is in flight. Raises Unavailable: DRAINING or OVERLOADED.

        A request alone is always let in: what it asks for was checked against the model before.
        """
        self.check_open()
        now = self._models[model]
        tokens = prompt_tokens + outputs * min(max_tokens, self.limits.expected_output_tokens)
        most_sequences = self.limits.sequences * limits.max_num_seqs
        most_tokens = self.limits.cache_tokens * limits.total_blocks * limits.block_size
        if now.sequences and (now.sequences + outputs > most_sequences or now.tokens + tokens > most_tokens):
            raise Unavailable(
                "OVERLOADED",
                f"model {model!r} has {now.sequences} sequences in flight and takes no more now; try again, or another "
                "replica",
                self.limits.retry_after_seconds,
            )
        now.sequences += outputs
        now.tokens += tokens
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            now.sequences -= outputs
            now.tokens -= tokens
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()

    def check_open(self) -> None:
        """Raises Unavailable (DRAINING) once the server is shutting down."""
        if self.draining:
            raise Unavailable("DRAINING", "the server is shutting down; try another replica")

    def close(self) -> None:
        """Let nothing in any more. What is in flight stays."""
        self.draining = True

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return self._num_requests == 0

    async def wait_idle(self) -> None:
        """Until nothing is in flight."""
        await self._idle.wait()
