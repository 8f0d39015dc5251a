"""Fairness between waiting tenants: they share the engine's tokens by their weights.

Virtual token counters: each tenant has a counter of what it was served, prompt tokens at one price and output tokens
at another, divided by its weight; the tenant with the lowest counter is next. Work-conserving: a share that no tenant
asks for goes to the others. A tenant that comes back is lifted to the lowest counter of waiting tenants, so that it
gets its share from now on and none for the time in which it asked for nothing.
Source: Fairness in Serving Large Language Models (Sheng et al., OSDI 2024, arXiv 2401.00588), algorithm 2.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import MutableMapping

from loraplex_engine.scheduling.request import Request

PROMPT_PRICE = 1.0  # computing a token of a prompt costs a fraction of a step,
OUTPUT_PRICE = 2.0  # while each token of an output takes part in a step of its own
REMEMBERED_TENANTS = 4096  # whose counters are kept, at least


class TenantQueue:
    """One tenant's requests of one priority, first come first. A removed one stays in the heap until it comes up."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._members: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def push(self, request: Request) -> None:
        number = request.order[1]
        heapq.heappush(self._heap, number)
        self._members[number] = request

    def peek(self) -> Request | None:
        while self._heap and self._heap[0] not in self._members:
            heapq.heappop(self._heap)
        return self._members[self._heap[0]] if self._heap else None

    def remove(self, request: Request) -> None:
        del self._members[request.order[1]]


class Level:
    """The tenants that wait at one priority. Every operation is O(log n) in requests and tenants, amortised."""

    def __init__(self, counters: MutableMapping[str, float]) -> None:
        self._counters = counters  # of all priorities
        self._queues: dict[str, TenantQueue] = {}
        # (counter, tenant) of each queue, once. A counter that grew since is found out when its entry comes up.
        self._turns: list[tuple[float, str]] = []
        self._last_counter = 0.0  # of the tenant that last was next: where a tenant begins if nobody waits

    def has(self, tenant: str) -> bool:
        return bool(self._queues.get(tenant))

    def push(self, request: Request) -> None:
        tenant = request.tenant
        if not self.has(tenant):
            lowest = self._lowest()
            floor = self._last_counter if lowest is None else self._counters[lowest]
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)
        if tenant not in self._queues:
            self._queues[tenant] = TenantQueue()
            heapq.heappush(self._turns, (self._counters[tenant], tenant))
        self._queues[tenant].push(request)

    def peek(self) -> Request | None:
        tenant = self._lowest()
        if tenant is None:
            return None
        self._last_counter = self._counters[tenant]
        return self._queues[tenant].peek()

    def remove(self, request: Request) -> None:
        self._queues[request.tenant].remove(request)

    def _lowest(self) -> str | None:
        """The waiting tenant with the lowest counter."""
        while self._turns:
            counter, tenant = self._turns[0]
            if not self._queues[tenant]:
                heapq.heappop(self._turns)
                del self._queues[tenant]
            elif counter < self._counters[tenant]:
                heapq.heapreplace(self._turns, (self._counters[tenant], tenant))
            else:
                return tenant
        return None


class FairQueue:
    """The requests that wait for a turn: by priority, then by their tenants' counters, then by arrival."""

    def __init__(self) -> None:
        self._levels: dict[int, Level] = {}  # by priority, of which the service allows some two hundred
        self._counters: OrderedDict[str, float] = OrderedDict()  # least recently asked for first
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        level = self._levels.setdefault(request.order[0], Level(self._counters))
        level.push(request)
        self._size += 1
        self._counters.move_to_end(request.tenant)
        if len(self._counters) > REMEMBERED_TENANTS:
            self._forget_oldest()

    def peek(self) -> Request | None:
        """The request whose turn it is."""
        for priority in sorted(self._levels):
            request = self._levels[priority].peek()
            if request is not None:
                return request
        return None

    def remove(self, request: Request) -> None:
        self._levels[request.order[0]].remove(request)
        self._size -= 1

    def charge(self, request: Request, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Count tokens that were computed, or are about to be, for the request's tenant."""
        if request.tenant in self._counters:
            price = PROMPT_PRICE * prompt_tokens + OUTPUT_PRICE * output_tokens
            self._counters[request.tenant] += price / request.weight

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._counters.get(tenant, 0.0)

    def _forget_oldest(self) -> None:
        tenant = next(iter(self._counters))
        if any(level.has(tenant) for level in self._levels.values()):
            self._counters.move_to_end(tenant)
        else:
            del self._counters[tenant]
