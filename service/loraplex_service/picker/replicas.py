"""The replicas, each kept up with by two tasks of its own: one hears of its health, one reads its metrics page."""

import asyncio
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from loraplex_service.keeping import kept
from loraplex_service.picker.asked import Asked, Wanted
from loraplex_service.picker.config import PickerConfig, ReplicasConfig
from loraplex_service.picker.page import Page, fetch_page, read_page
from loraplex_service.picker.policy import Health, Place, Standing, ranked

logger = logging.getLogger(__name__)

MAX_ADDRESSES: Final = 256  # of one name
MAX_EXPECTED: Final = 1024  # adapters that are on their way to a replica
EXPECT_SECONDS: Final = 5.0  # that an adapter is taken to be on its way, where the page does not show it before
RETRY_SECONDS: Final = (0.2, 2.0)  # between two attempts to hear of a replica's health: the first, and the longest
_CHANNEL: Final = (
    ("grpc.max_receive_message_length", 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)


class Replica:
    """One replica, as far as it is known."""

    def __init__(self, address: str, ports: ReplicasConfig, clock: Callable[[], float]) -> None:
        self.address = address
        self.ports = ports
        self.health = Health.UNKNOWN
        self._clock = clock
        self._page = Page()
        self._page_time = float("-inf")
        self.num_given = 0  # requests that were sent there, in all
        self._given_before_page = 0
        self._expected = OrderedDict[Wanted, float]()  # adapters that were asked for there, and until when that counts

    def endpoint(self, is_grpc: bool) -> str | None:
        """Where it takes gRPC, or HTTP; None: it takes no HTTP."""
        port = self.ports.data_port if is_grpc else self.ports.http_port
        return None if port is None else f"{_bracketed(self.address)}:{port}"

    def standing(self, asked: Asked, endpoint: str, stale_seconds: float) -> Standing:
        """How it stands to a request."""
        page, given = self._page, self.num_given - self._given_before_page
        return Standing(
            endpoint,
            Health.DRAINING if page.is_draining and self.health is Health.SERVING else self.health,
            self._clock() - self._page_time <= stale_seconds,
            min((self._place(adapter) for adapter in asked.adapters), default=Place.FULL),
            page.num_requests + given,
        )

    def give(self, asked: Asked) -> None:
        """Note that a request goes there: its page does not show it yet."""
        self.num_given += 1
        for adapter in asked.adapters:
            self._expected.pop(adapter, None)
            self._expected[adapter] = self._clock() + EXPECT_SECONDS
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    async def read(self) -> None:
        """Read its page anew. Raises OSError, ValueError."""
        given, now = self.num_given, self._clock()
        text = await fetch_page(self.address, self.ports.metrics_port)
        self.learn(await asyncio.to_thread(read_page, text), now, given)

    def learn(self, page: Page, time: float, given: int = 0) -> None:
        """Note what it says of itself, as of a time; `given`: the requests that had been sent there by then."""
        self._page, self._page_time, self._given_before_page = page, time, given

    def _place(self, adapter: Wanted) -> Place:
        place = self._page.place(adapter)
        is_expected = self._expected.get(adapter, 0) > self._clock()
        return max(place, Place.DEVICE) if is_expected else place


class Fleet:
    """All replicas. For one event loop."""

    def __init__(self, config: PickerConfig) -> None:
        self._config = config
        self._replicas: dict[tuple[str, ReplicasConfig], tuple[Replica, asyncio.Task[None]]] = {}

    @property
    def replicas(self) -> Iterable[Replica]:
        return [replica for replica, _ in tuple(self._replicas.values())]  # at one moment: other threads ask, too

    def by_health(self) -> Mapping[Health, int]:
        counts = Counter(replica.health for replica in self.replicas)
        return {health: counts[health] for health in Health}

    @property
    def is_known(self) -> bool:
        """Whether enough is known to send requests anywhere."""
        config, nothing = self._config, Asked()
        standings = (replica.standing(nothing, "", config.stale_seconds) for replica in self.replicas)
        return bool(ranked(standings, "", config.queue, config.balance_factor))

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Keep up with the replicas for the length of the block."""
        finding = asyncio.create_task(kept("find replicas", self._find), name="find replicas")
        try:
            yield
        finally:
            tasks = [finding, *(task for _, task in self._replicas.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _find(self) -> None:
        while True:
            for ports in self._config.replicas:
                try:
                    self._take(ports, await _addresses(ports.host))
                except (
                    OSError,
                    UnicodeError,
                ) as error:  # those that are known stay: their own health says whether they are there
                    logger.warning("the addresses of %s are not known now: %s", ports.host, error)
            await asyncio.sleep(self._config.resolve_seconds)

    def _take(self, ports: ReplicasConfig, addresses: Iterable[str]) -> None:
        found = {(address, ports) for address in addresses}
        known = {key for key in self._replicas if key[1] is ports}
        for key in known - found:
            _, task = self._replicas.pop(key)
            task.cancel()
        for key in found - known:
            replica = Replica(key[0], ports, asyncio.get_running_loop().time)
            self._replicas[key] = replica, asyncio.create_task(self._keep_up(replica), name=f"replica {key[0]}")

    async def _keep_up(self, replica: Replica) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(kept("hear of a replica's health", partial(_hear_of_health, replica)))
            group.create_task(kept("read a replica's page", partial(self._keep_reading, replica)))

    async def _keep_reading(self, replica: Replica) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.stale_seconds):
                    await replica.read()
            except (OSError, ValueError) as error:  # TimeoutError is one, too
                logger.debug("%s: %s", replica.address, error)
            await asyncio.sleep(self._config.scrape_seconds)


async def _hear_of_health(replica: Replica) -> None:
    delay, longest = RETRY_SECONDS
    request = HealthCheckRequest(service="readiness")
    target = f"{_bracketed(replica.address)}:{replica.ports.health_port}"
    async with grpc.aio.insecure_channel(target, options=_CHANNEL) as channel:
        while True:
            try:
                async for answer in HealthStub(channel).Watch(request):  # type: ignore[attr-defined]
                    serving = answer.status == HealthCheckResponse.SERVING
                    _change(replica, Health.SERVING if serving else Health.DRAINING)
                    delay = RETRY_SECONDS[0]
            except grpc.aio.AioRpcError as error:
                logger.debug("%s: %s", replica.address, error.details())
            _change(replica, Health.DEAD)
            await asyncio.sleep(delay)
            delay = min(2 * delay, longest)


def _change(replica: Replica, health: Health) -> None:
    if replica.health is not health:
        logger.info("%s:%d is %s", replica.address, replica.ports.data_port, health.value)
        replica.health = health


async def _addresses(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})[:MAX_ADDRESSES]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
