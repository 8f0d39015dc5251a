"""The limit on work per model: beyond it the service refuses requests. This policy is in no other file."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex_engine.link.messages import EngineLimits
from loraplex_service.errors import DeadlineExceeded, Unavailable

FADING = 0.98  # decay of the sums below with each request that leaves: about fifty count
MAX_RETRY_AFTER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Limits on the requests in flight of one model, running and waiting, as multiples of what can run at once."""

    sequences: float = 4.0  # times max_num_seqs
    cache_tokens: float = 4.0  # times the tokens that the KV cache holds
    expected_output_tokens: int = 512  # an output counts as at most so many tokens: few use all that they ask for
    retry_after_seconds: float = 1.0


@dataclass(slots=True)
class _Amount:
    sequences: int = 0
    tokens: int = 0

    def add(self, sequences: int, tokens: int) -> None:
        self.sequences += sequences
        self.tokens += tokens


class _InFlight:
    """The work that one model has in flight, by tenant, and the rate at which it finishes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.all = _Amount()
        self.tenants: dict[str, _Amount] = {}
        self._weights: dict[str, float] = {}
        self._clock = clock
        self._loads = 0.0  # loads that left while others waited, decayed
        self._seconds = 0.0  # seconds that these took, decayed
        self._last_exit = 0.0

    def share(self, tenant: str, weight: float) -> float:
        """The tenant's share of the model, beside the tenants that have requests in flight."""
        others = sum(self._weights.values()) - self._weights.get(tenant, 0.0)
        return weight / (weight + others)

    def wait_seconds(self, limits: EngineLimits, tenant: str, weight: float, more: _Amount) -> float:
        """The expected wait of one more request of this tenant, by the rate seen so far; 0 before any was seen."""
        own = self.tenants.get(tenant, _Amount())
        alone = _load(limits, own, more) / self.share(tenant, weight)  # as if all other tenants took their whole shares
        ahead = min(_load(limits, self.all, more), alone) - 1
        return 0.0 if ahead <= 0 or self._loads <= 0 else ahead * self._seconds / self._loads

    def enter(self, limits: EngineLimits, tenant: str, weight: float, more: _Amount) -> None:
        if _load(limits, self.all) <= 1:
            self._last_exit = self._clock()  # no request has waited until now
        self.all.add(more.sequences, more.tokens)
        self.tenants.setdefault(tenant, _Amount()).add(more.sequences, more.tokens)
        self._weights[tenant] = weight

    def leave(self, limits: EngineLimits, tenant: str, less: _Amount) -> None:
        before = _load(limits, self.all)
        self.all.add(-less.sequences, -less.tokens)
        own = self.tenants[tenant]
        own.add(-less.sequences, -less.tokens)
        if own.sequences == 0:
            del self.tenants[tenant], self._weights[tenant]
        if before > 1:
            now = self._clock()
            self._loads = self._loads * FADING + before - _load(limits, self.all)
            self._seconds = self._seconds * FADING + now - self._last_exit
            self._last_exit = now


def _load(limits: EngineLimits, *amounts: _Amount) -> float:
    """The size of these requests together, as a share of what the model can run at once."""
    sequences, tokens = sum(amount.sequences for amount in amounts), sum(amount.tokens for amount in amounts)
    return max(sequences / limits.max_num_seqs, tokens / (limits.total_blocks * limits.block_size))


class Admission:
    """Counts the requests in flight by model, and refuses those above the limits, so that queues stay short.

    Where one tenant has filled the queue, others still get in up to their shares of it, so that the engine has
    requests of theirs to choose from: at most twice the limits can be in flight. For one event loop.
    """

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        check_records: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_records`: raises Unavailable while usage records cannot be written."""
        self._check_records = check_records
        self.limits = limits or AdmissionLimits()
        self.draining = False
        self._models: defaultdict[str, _InFlight] = defaultdict(lambda: _InFlight(clock))
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def expected_tokens(self, prompt_tokens: int, outputs: int, max_tokens: int) -> int:
        """The cache tokens that a request counts for."""
        return prompt_tokens + outputs * min(max_tokens, self.limits.expected_output_tokens)

    def check(self, model: str, limits: EngineLimits, tenant: str = "", weight: float = 1.0) -> None:
        """Raise Unavailable (DRAINING, USAGE_UNWRITABLE, OVERLOADED) if `enter` would refuse every request."""
        self.check_open()
        self._check_room(model, limits, tenant, weight, _Amount(1, 1))

    @contextmanager
    def enter(
        self,
        model: str,
        limits: EngineLimits,
        prompt_tokens: int,
        outputs: int,
        max_tokens: int,
        tenant: str = "",
        weight: float = 1.0,
        seconds_left: float | None = None,
    ) -> Iterator[None]:
        """Hold a place for one request for the length of the block. Raises Unavailable as `check` does.

        A request without others in flight is always let in: its size was checked before. `seconds_left`: the time until
        its deadline. A request that would still wait then is refused now, while it can go to another replica. Raises
        DeadlineExceeded if no time is left.
        """
        if seconds_left is not None and seconds_left <= 0:
            raise DeadlineExceeded(
                "the deadline of the call passed before the request could be let in; allow more time"
            )
        self.check_open()
        more = _Amount(outputs, self.expected_tokens(prompt_tokens, outputs, max_tokens))
        self._check_room(model, limits, tenant, weight, more)
        in_flight = self._models[model]
        wait_seconds = in_flight.wait_seconds(limits, tenant, weight, more)
        if seconds_left is not None and wait_seconds > seconds_left:
            raise Unavailable(
                "OVERLOADED",
                f"model {model!r} has work for {wait_seconds:.1f} s before this request, whose deadline is in "
                f"{seconds_left:.1f} s; try another replica, or allow more time",
                self._retry_after(wait_seconds - seconds_left),
            )
        in_flight.enter(limits, tenant, weight, more)
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            in_flight.leave(limits, tenant, more)
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()

    def _check_room(self, model: str, limits: EngineLimits, tenant: str, weight: float, more: _Amount) -> None:
        in_flight = self._models[model]
        own = in_flight.tenants.get(tenant, _Amount())
        share = in_flight.share(tenant, weight)
        if self._fits(limits, in_flight.all, more, 1.0):
            return
        if self._fits(limits, own, more, share) and self._fits(limits, in_flight.all, more, 2.0):
            return
        raise Unavailable(
            "OVERLOADED",
            f"model {model!r} has {in_flight.all.sequences} sequences in flight and accepts no more now; try again, or "
            "another replica",
            self._retry_after(in_flight.wait_seconds(limits, tenant, weight, more)),
        )

    def _fits(self, limits: EngineLimits, held: _Amount, more: _Amount, share: float) -> bool:
        most_sequences = share * self.limits.sequences * limits.max_num_seqs
        most_tokens = share * self.limits.cache_tokens * limits.total_blocks * limits.block_size
        return held.sequences == 0 or (
            held.sequences + more.sequences <= most_sequences and held.tokens + more.tokens <= most_tokens
        )

    def _retry_after(self, seconds: float) -> float:
        """The seconds to wait before a retry: at least the configured ones, capped lest callers miss a recovery."""
        return max(self.limits.retry_after_seconds, min(seconds, MAX_RETRY_AFTER_SECONDS))

    def check_open(self) -> None:
        """Raise Unavailable: DRAINING while the server shuts down, USAGE_UNWRITABLE while records cannot be written."""
        if self.draining:
            raise Unavailable("DRAINING", "the server is shutting down; try another replica")
        self._check_records()

    def close(self) -> None:
        """Refuse all requests from now on. Those in flight go on."""
        self.draining = True

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return self._num_requests == 0

    @property
    def sequences(self) -> Mapping[str, int]:
        """The sequences in flight of each model that has had some."""
        return {model: in_flight.all.sequences for model, in_flight in self._models.items()}

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()
