"""What the choice does to a fleet whose pages come late: a simulation of it, a fiftieth of a second at a time.

Servers run everything that they have at once, each request the slower for the others, as engines do up to hundreds of
sequences: nothing waits. One server may be slower than the others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_service.picker.asked import Asked, Wanted
from loraplex_service.picker.config import PickerConfig, ReplicasConfig
from loraplex_service.picker.page import Page
from loraplex_service.picker.policy import Health, Place
from loraplex_service.picker.processor import Picker
from loraplex_service.picker.replicas import Replica

TICK = 0.02
SECONDS = 20
ADAPTERS = [f"a{number}" for number in range(30)]
WEIGHTS = [1 / rank for rank in range(1, len(ADAPTERS) + 1)]
SLOTS = 12
PORTS = ReplicasConfig("replicas")
CONFIG = PickerConfig(replicas=(PORTS,))


@dataclass
class Server:
    """One that shares its speed, in requests a second, out among those that it has."""

    speed: float
    requests: list[tuple[str, float]] = field(default_factory=list)  # the adapter, and how much is left of one
    slots: OrderedDict[str, None] = field(default_factory=OrderedDict)
    num_ended: int = 0

    def begin(self, adapter: str) -> None:
        self.slots[adapter] = None
        self.slots.move_to_end(adapter)
        while len(self.slots) > SLOTS:
            self.slots.popitem(last=False)
        self.requests.append((adapter, 1.0))

    def work(self) -> None:
        done = TICK * self.speed / max(len(self.requests), 1)
        left = [(adapter, rest - done) for adapter, rest in self.requests if rest > done]
        self.num_ended += len(self.requests) - len(left)
        self.requests = left

    def page(self) -> Page:
        in_use = {adapter for adapter, _ in self.requests} & self.slots.keys()
        loaded = {adapter: {"shared": Place.DEVICE} for adapter in self.slots}
        return Page(loaded, in_use, num_slots=SLOTS, num_requests=len(self.requests))


class Fleet:
    """Servers, and what the picker knows of them: their pages as they were `lag` seconds ago."""

    def __init__(self, speeds: list[float], lag: float) -> None:
        self.now = 0.0
        self.servers = [Server(speed) for speed in speeds]
        self.replicas = [Replica(f"10.0.0.{number}", PORTS, lambda: self.now) for number in range(len(speeds))]
        self._unseen_since = [0] * len(speeds)  # what had ended by the page that is known
        self._coming = deque[tuple[float, int, Page, float, int, int]]()
        self._lag = lag
        self._picker = Picker(CONFIG, self)  # type: ignore[arg-type]
        for number, replica in enumerate(self.replicas):
            replica.health = Health.SERVING
            self._look(number)
        self._learn(lag)

    @property
    def loads(self) -> list[int]:
        return [len(server.requests) for server in self.servers]

    @property
    def num_unseen(self) -> int:
        """Requests that have ended, of which no page has told yet."""
        return sum(server.num_ended - ended for server, ended in zip(self.servers, self._unseen_since, strict=True))

    def send(self, adapter: str) -> int:
        """Send a request where the picker says, and return which server that is."""
        [first, *_] = self._picker.pick(Asked((Wanted(None, adapter),), adapter, is_grpc=True))
        chosen = [replica.endpoint(is_grpc=True) for replica in self.replicas].index(first)
        self.servers[chosen].begin(adapter)
        return chosen

    def pass_time(self) -> None:
        self.now += TICK
        for number, server in enumerate(self.servers):
            server.work()
            if int(self.now / CONFIG.scrape_seconds) > int((self.now - TICK) / CONFIG.scrape_seconds):
                self._look(number)
        self._learn(0)

    def _look(self, number: int) -> None:
        server, given = self.servers[number], self.replicas[number].num_given
        self._coming.append((self.now + self._lag, number, server.page(), self.now, given, server.num_ended))

    def _learn(self, early: float) -> None:
        while self._coming and self._coming[0][0] <= self.now + early:
            _, number, page, time, given, ended = self._coming.popleft()
            self.replicas[number].learn(page, time, given)
            self._unseen_since[number] = ended


def moments(rng: Random, rate: float) -> list[float]:
    return sorted(rng.uniform(0, SECONDS) for _ in range(int(rate * SECONDS)))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.floats(4, 16), min_size=2, max_size=4),
    st.floats(0.3, 1.3),
    st.floats(0, 1),
)
def test_no_request_goes_where_more_are_than_the_factor_allows_however_late_pages_are(
    seed: int, speeds: list[float], load: float, lag: float
) -> None:
    """Past what a page has not told: a request that has ended counts until a page says so."""
    rng, fleet = Random(seed), Fleet(speeds, lag)
    for moment in moments(rng, load * sum(speeds)):
        while fleet.now < moment:
            fleet.pass_time()
        seen = sum(fleet.loads) + fleet.num_unseen
        chosen = fleet.send(rng.choices(ADAPTERS, WEIGHTS)[0])
        assert fleet.loads[chosen] <= 1 + max(CONFIG.queue, CONFIG.balance_factor * seen / len(speeds))


@pytest.mark.parametrize("lag", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_slow_server_does_not_draw_more_for_having_its_adapters_in_use_the_longer(seed: int, lag: float) -> None:
    rng, fleet = Random(seed), Fleet([5, 10, 10], lag)
    ratios = []
    for moment in moments(rng, 23):
        while fleet.now < moment:
            fleet.pass_time()
        fleet.send(rng.choices(ADAPTERS, WEIGHTS)[0])
        ratios.append(max(fleet.loads) * len(fleet.loads) / sum(fleet.loads))
    assert fmean(ratios[100:]) < 2  # 3: one has everything
