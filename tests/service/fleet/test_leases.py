"""Quotas over a fleet: together the replicas let through what one bucket would, and a slice for each at most."""

import asyncio
from contextlib import ExitStack, closing

from loraplex_service.fleet.database import Database, DatabaseAway
from loraplex_service.fleet.leases import SLICES, LeasedBucket, Leases
from tests.service.fleet.conftest import TestDatabase
from tests.service.fleet.test_replicas import until

RATE, BURST = 1e-3, 40_000.0  # a bucket of 40 that does not fill while a test runs
CAPACITY = RATE * BURST


def empty(bucket: LeasedBucket) -> int:
    count = 0
    while bucket.take(1) == 0:
        count += 1
    return count


def leases_of(database: Database) -> Leases:
    async def settle(name: str, rate: float, capacity: float, owed: float, missing: float) -> float:
        return database.settle(name, rate, capacity, owed, missing)

    return Leases(settle, lambda: 2)


async def test_replicas_share_one_bucket(database: TestDatabase) -> None:
    taken = 0
    with ExitStack() as stack:
        leases = [leases_of(stack.enter_context(closing(Database(database.dsn, name)))) for name in ("a", "b", "c")]
        buckets = [lease.bucket("acme: requests", RATE, BURST) for lease in leases]
        for _ in range(3 * SLICES):
            for lease, bucket in zip(leases, buckets, strict=True):
                taken += empty(bucket)
                await lease._settle_all(0.0)
    assert CAPACITY <= taken <= CAPACITY + len(buckets) * CAPACITY / SLICES


async def test_what_was_taken_before_the_database_was_asked_is_paid_for(database: TestDatabase) -> None:
    with closing(Database(database.dsn, "one")) as connection:
        leases = [leases_of(connection) for _ in range(SLICES)]
        buckets = [lease.bucket("acme: requests", RATE, BURST) for lease in leases]
        assert sum(map(empty, buckets)) == CAPACITY
        for lease in leases:
            await lease._settle_all(0.0)
        assert sum(map(empty, buckets)) <= 3 * CAPACITY / SLICES
    ((level,),) = database.ask("SELECT level FROM loraplex_buckets")
    assert level < 1


def test_a_bucket_fills_by_the_clock_of_the_database_and_never_beyond_its_capacity(database: TestDatabase) -> None:
    with closing(Database(database.dsn, "one")) as connection:
        assert connection.settle("acme: requests", 0.01, 40.0, 0.0, 40.0) == 40
        for seconds, filled in ((2000, 20), (36000, 40), (-36000, 0)):
            database.ask("UPDATE loraplex_buckets SET level = 0, filled = now() - make_interval(secs => %s)", seconds)
            assert filled <= connection.settle("acme: requests", 0.01, 40.0, 0.0, 40.0) < filled + 10
    ((is_now,),) = database.ask("SELECT filled <= now() FROM loraplex_buckets")
    assert is_now  # whatever the clock of the database said before


def test_what_is_given_back_can_be_taken_again() -> None:
    bucket = LeasedBucket(RATE, BURST, lambda: None)
    bucket.take(10)
    assert bucket.take(5) > 0
    bucket.give_back(6)
    assert bucket.take(5) == 0


def test_a_cost_beyond_a_slice_is_let_in_on_credit() -> None:
    bucket = LeasedBucket(RATE, BURST, lambda: None)
    assert bucket.take(CAPACITY) == 0
    assert bucket.take(1) > 0
    assert bucket.account()[1] == CAPACITY


async def test_while_the_database_is_away_each_replica_has_its_share_of_the_rate() -> None:
    async def away(*account: object) -> float:
        raise DatabaseAway("it is away")

    leases = Leases(away, lambda: 4)
    bucket = leases.bucket("acme: requests", 100.0, 1.0)
    empty(bucket)
    await leases._settle_all(0.2)
    assert empty(bucket) == 5


async def test_a_slice_that_runs_low_is_filled_at_once() -> None:
    settled: list[str] = []

    async def settle(name: str, rate: float, capacity: float, owed: float, missing: float) -> float:
        settled.append(name)
        return missing

    leases = Leases(settle, lambda: 1)
    keeping = asyncio.create_task(leases.keep())
    bucket = leases.bucket("acme: requests", RATE, BURST)
    empty(bucket)
    await until(lambda: bucket.take(1) == 0)
    assert settled[0] == "acme: requests"
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
