"""Token buckets of a whole fleet, of which each replica has a slice at hand.

No request waits for the database: it is taken from the slice, and slices are filled beside that. A replica begins with
a slice that it has not asked for yet, and pays for it first; so all of them together let through what one bucket would,
and one slice for each replica more at most.
"""

import asyncio
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from loraplex_service.fleet.database import DatabaseAway

SLICES = 4  # of a burst
SETTLE_SECONDS = 0.25

# Of a bucket by name, rate and capacity: pays what is owed, then takes this amount or what there is of it.
Settle = Callable[[str, float, float, float, float], Awaitable[float]]


class LeasedBucket:
    """A slice of a bucket that all replicas share. A larger cost is let in when the slice is full, on credit."""

    def __init__(self, rate: float, burst_seconds: float, ran_low: Callable[[], None]) -> None:
        self.rate = rate
        self.capacity = max(1.0, rate * burst_seconds)
        self._slice = max(1.0, self.capacity / SLICES)
        self._level = self._slice
        self._owed = self._slice  # of what was taken before the database was asked
        self._ran_low = ran_low

    def take(self, amount: float) -> float:
        """Take this amount and return 0.

        With too little left, take nothing and return the seconds until there is enough.
        """
        missing = min(amount, self._slice) - self._level
        if missing <= 0:
            self._level -= amount
        if self._level < self._slice / 2:
            self._ran_low()
        return max(missing, 0.0) / self.rate

    def give_back(self, amount: float) -> None:
        """Give back an amount that was taken and not used; negative: take what was used beyond it."""
        self._level += amount

    def account(self) -> tuple[float, float]:
        """What is owed, and what is missing until the slice is full; negative: what is too much."""
        return self._owed, self._slice - self._level

    def settled(self, paid: float, granted: float) -> None:
        """Take what was granted."""
        self._owed -= paid
        self._level += granted

    def fill(self, seconds: float) -> None:
        """Fill by time, as while nobody can be asked."""
        self._level = max(self._level, min(self._slice, self._level + self.rate * seconds))


class Leases:
    """Fills the slices of one replica. For one event loop."""

    def __init__(self, settle: Settle, replicas: Callable[[], int]) -> None:
        """`replicas`: how many there are, to share the rates out while the database is away."""
        self._settle = settle
        self._replicas = replicas
        self._buckets: WeakValueDictionary[str, LeasedBucket] = WeakValueDictionary()
        self._low = asyncio.Event()

    def bucket(self, name: str, rate: float, burst_seconds: float) -> LeasedBucket:
        """The replica's slice of a bucket."""
        found = self._buckets[name] = LeasedBucket(rate, burst_seconds, self._low.set)
        return found

    async def keep(self) -> None:
        """Fill the slices. Never returns."""
        loop = asyncio.get_running_loop()
        settled_at = loop.time()
        while True:
            try:
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._low.wait()
                await asyncio.sleep(SETTLE_SECONDS / 10)  # for those that run low together
            except TimeoutError:
                pass
            self._low.clear()
            seconds, settled_at = loop.time() - settled_at, loop.time()
            await self._settle_all(seconds)

    async def _settle_all(self, seconds: float) -> None:
        away = False
        for name, bucket in sorted(self._buckets.items()):
            owed, missing = bucket.account()
            if owed or missing:
                away = away or not await self._settle_one(name, bucket, owed, missing)
                if away:
                    bucket.fill(seconds / self._replicas())

    async def _settle_one(self, name: str, bucket: LeasedBucket, owed: float, missing: float) -> bool:
        """Whether the database could be asked."""
        try:
            granted = await self._settle(name, bucket.rate, bucket.capacity, owed, missing)
        except DatabaseAway:
            return False
        bucket.settled(owed, granted)
        return True
