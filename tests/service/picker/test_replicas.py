"""How a replica stands between two looks at its page."""

from __future__ import annotations

import pytest

from loraplex_service.picker.asked import Asked, Wanted
from loraplex_service.picker.config import ReplicasConfig
from loraplex_service.picker.page import Page
from loraplex_service.picker.policy import Health, Place, Standing
from loraplex_service.picker.replicas import EXPECT_SECONDS, MAX_EXPECTED, Replica

LEGAL = Asked((Wanted(None, "legal"),))
STALE = 3.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replica(clock: Clock) -> Replica:
    replica = Replica("10.0.0.1", ReplicasConfig("replicas"), clock)
    replica.health = Health.SERVING
    replica.learn(Page(num_slots=4), clock.now)
    return replica


def standing(replica: Replica, asked: Asked = LEGAL) -> Standing:
    return replica.standing(asked, "10.0.0.1:50051", STALE)


def test_one_that_was_never_heard_of_is_not_known(clock: Clock) -> None:
    found = standing(Replica("10.0.0.1", ReplicasConfig("replicas"), clock))
    assert (found.health, found.is_fresh) == (Health.UNKNOWN, False)


def test_what_it_said_counts_no_more_after_a_while(replica: Replica, clock: Clock) -> None:
    clock.now += STALE
    assert standing(replica).is_fresh
    clock.now += 0.1
    assert not standing(replica).is_fresh


def test_what_was_given_since_its_page_counts(replica: Replica, clock: Clock) -> None:
    replica.give(LEGAL)
    replica.give(Asked())
    assert standing(replica).num_requests == 2
    replica.learn(Page(num_slots=4, num_requests=1), clock.now, given=1)
    assert standing(replica).num_requests == 2


def test_an_adapter_is_expected_where_it_was_asked_for_until_the_page_should_show_it(
    replica: Replica, clock: Clock
) -> None:
    assert standing(replica).place is Place.ROOM
    replica.give(LEGAL)
    assert standing(replica).place is Place.DEVICE
    clock.now += EXPECT_SECONDS
    assert standing(replica).place is Place.ROOM


def test_of_a_sum_the_farthest_adapter_counts(replica: Replica) -> None:
    replica.give(LEGAL)
    both = Asked((*LEGAL.adapters, Wanted(None, "other")))
    assert standing(replica, both).place is Place.ROOM


def test_names_that_callers_think_of_do_not_fill_the_memory(replica: Replica) -> None:
    for number in range(2 * MAX_EXPECTED):
        replica.give(Asked((Wanted(None, str(number)),)))
    held = [
        number for number in range(2 * MAX_EXPECTED) if standing(replica, Asked((Wanted(None, str(number)),))).place
    ]
    assert sum(standing(replica, Asked((Wanted(None, str(n)),))).place is Place.DEVICE for n in held) == MAX_EXPECTED


def test_one_that_drains_says_so_on_its_page_too(replica: Replica, clock: Clock) -> None:
    replica.learn(Page(is_draining=True), clock.now)
    assert standing(replica).health is Health.DRAINING


def test_addresses_are_written_as_envoy_reads_them(clock: Clock) -> None:
    assert Replica("10.0.0.1", ReplicasConfig("x"), clock).endpoint(is_grpc=True) == "10.0.0.1:50051"
    assert Replica("fd00::1", ReplicasConfig("x", http_port=8000), clock).endpoint(is_grpc=False) == "[fd00::1]:8000"
    assert Replica("10.0.0.1", ReplicasConfig("x"), clock).endpoint(is_grpc=False) is None
