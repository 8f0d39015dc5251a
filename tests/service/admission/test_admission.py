"""How much is let in, by model."""

from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from loraplex_service.admission.admission import Admission, AdmissionLimits
from loraplex_service.errors import DeadlineExceeded, Unavailable
from tests.service.fake_engine import LIMITS

SMALL = msgspec.structs.replace(LIMITS, max_num_seqs=2, total_blocks=4, block_size=16)  # 64 tokens


def admission(sequences: float = 100, cache_tokens: float = 100) -> Admission:
    return Admission(AdmissionLimits(sequences, cache_tokens, expected_output_tokens=10))


def refusal(
    admission: Admission, model: str, prompt_tokens: int, outputs: int = 1, max_tokens: int = 1, **caller: Any
) -> str:
    """Why a request is refused; empty if it is let in."""
    try:
        with admission.enter(model, SMALL, prompt_tokens, outputs, max_tokens, **caller):
            return ""
    except Unavailable as error:
        return error.reason


def test_sequences_are_bounded() -> None:
    policy = admission(sequences=1.5)
    with policy.enter("m", SMALL, 1, 2, 1):
        assert refusal(policy, "m", 1) == ""
        assert refusal(policy, "m", 1, outputs=2) == "OVERLOADED"


def test_cache_tokens_are_bounded() -> None:
    policy = admission(cache_tokens=1.0)
    with policy.enter("m", SMALL, 40, 1, 1):
        assert refusal(policy, "m", 22) == ""
        assert refusal(policy, "m", 23) == "OVERLOADED"


def test_every_output_counts_and_none_with_more_than_is_expected() -> None:
    policy = admission(cache_tokens=1.0)
    with policy.enter("m", SMALL, 4, 2, 1000):  # 4 + 2 * 10
        assert refusal(policy, "m", 30, max_tokens=1000) == ""
        assert refusal(policy, "m", 31, max_tokens=1000) == "OVERLOADED"


def test_a_request_alone_is_let_in_whatever_its_size() -> None:
    assert refusal(admission(sequences=0.1, cache_tokens=0.1), "m", 10_000, outputs=16, max_tokens=10_000) == ""


def test_models_do_not_take_each_others_room() -> None:
    policy = admission(sequences=0.5)
    with policy.enter("m", SMALL, 1, 1, 1):
        assert refusal(policy, "m", 1) == "OVERLOADED"
        assert refusal(policy, "other", 1) == ""


def test_tokens_are_given_back() -> None:
    policy = admission(cache_tokens=1.0)
    with policy.enter("m", SMALL, 1, 1, 1):
        for _ in range(3):
            assert refusal(policy, "m", 50) == ""


def test_room_is_given_back_however_a_request_ends() -> None:
    policy = admission(sequences=0.5)
    with pytest.raises(KeyError), policy.enter("m", SMALL, 1, 1, 1):
        raise KeyError
    assert policy.idle
    assert refusal(policy, "m", 1) == ""


def test_sequences_are_in_flight_from_when_they_are_let_in_to_their_end() -> None:
    policy = admission()
    with policy.enter("m", SMALL, 1, 2, 1), policy.enter("m", SMALL, 1, 1, 1):
        assert policy.sequences == {"m": 3}
    assert policy.sequences == {"m": 0}


def test_when_draining_nothing_is_let_in() -> None:
    policy = admission()
    policy.close()
    assert refusal(policy, "m", 1) == "DRAINING"


async def test_idle_is_waited_for() -> None:
    policy = admission()
    with policy.enter("m", SMALL, 1, 1, 1):
        assert not policy.idle
    await policy.wait_idle()


# ---- tenants ---------------------------------------------------------------------------------------------------------


def test_who_fills_the_queue_keeps_nobody_else_out() -> None:
    policy = admission(sequences=4)  # 8 of them
    with ExitStack() as flood:
        for _ in range(8):
            flood.enter_context(policy.enter("m", SMALL, 1, 1, 1, tenant="a"))
        assert refusal(policy, "m", 1, tenant="a") == "OVERLOADED"
        for _ in range(4):  # its half of the queue
            flood.enter_context(policy.enter("m", SMALL, 1, 1, 1, tenant="b"))
        assert refusal(policy, "m", 1, tenant="b") == "OVERLOADED"


def test_a_heavier_tenant_gets_more_of_the_queue() -> None:
    policy = admission(sequences=4)
    with ExitStack() as flood:
        for _ in range(8):
            flood.enter_context(policy.enter("m", SMALL, 1, 1, 1, tenant="a", weight=1.0))
        for _ in range(6):  # three quarters
            flood.enter_context(policy.enter("m", SMALL, 1, 1, 1, tenant="b", weight=3.0))
        assert refusal(policy, "m", 1, tenant="b", weight=3.0) == "OVERLOADED"


def test_any_number_of_tenants_gets_no_more_than_twice_the_limits() -> None:
    policy = admission(sequences=4)
    with ExitStack() as flood:
        for number in range(16):
            flood.enter_context(policy.enter("m", SMALL, 1, 1, 1, tenant=f"t{number}"))
        assert refusal(policy, "m", 1, tenant="one more") == "OVERLOADED"


# ---- deadlines -------------------------------------------------------------------------------------------------------


class Queue:
    """An engine that runs two at once and takes a second for each, behind a full queue."""

    def __init__(self, length: int) -> None:
        self.now = 0.0
        self.policy = Admission(AdmissionLimits(100, 100, expected_output_tokens=10), clock=lambda: self.now)
        self.exits: list[ExitStack] = []
        for _ in range(length):
            self.enter()

    def enter(self, tenant: str = "a") -> None:
        held = ExitStack()
        held.enter_context(self.policy.enter("m", SMALL, 1, 1, 1, tenant=tenant))
        self.exits.append(held)

    def work(self, count: int) -> None:
        """Some are done, and as many come."""
        for _ in range(count):
            self.now += 0.5
            self.exits.pop(0).close()
            self.enter()


def test_who_would_still_wait_at_the_deadline_is_refused_at_once() -> None:
    queue = Queue(length=12)
    queue.work(20)  # each takes half a second of the engine: the 13th is behind 11 of them
    assert refusal(queue.policy, "m", 1, tenant="a", seconds_left=4.0) == "OVERLOADED"
    assert refusal(queue.policy, "m", 1, tenant="a", seconds_left=7.0) == ""
    assert refusal(queue.policy, "m", 1, tenant="a") == ""


def test_who_has_no_time_left_has_missed_its_deadline_and_is_not_told_of_a_queue() -> None:
    with pytest.raises(DeadlineExceeded), admission().enter("m", SMALL, 1, 1, 1, seconds_left=-0.001):
        pass


def test_who_comes_to_its_share_is_not_judged_by_the_queue_of_another() -> None:
    queue = Queue(length=12)
    queue.work(20)
    assert refusal(queue.policy, "m", 1, tenant="b", seconds_left=1.0) == ""


def test_before_anything_is_known_of_the_speed_nobody_is_refused() -> None:
    assert refusal(Queue(length=12).policy, "m", 1, tenant="a", seconds_left=0.001) == ""


def test_idle_time_does_not_count_as_slowness() -> None:
    queue = Queue(length=12)
    queue.work(20)
    while queue.exits:
        queue.exits.pop().close()
    queue.now += 1000
    for _ in range(12):
        queue.enter()
    queue.work(20)
    assert refusal(queue.policy, "m", 1, tenant="a", seconds_left=7.0) == ""


def test_the_refused_are_told_when_to_come_again() -> None:
    queue = Queue(length=12)
    queue.work(20)
    with pytest.raises(Unavailable) as raised, queue.policy.enter("m", SMALL, 1, 1, 1, "a", 1.0, 1.0):
        pass
    assert raised.value.retry_after_seconds == pytest.approx(4.5, abs=0.6)  # 11 / 2 s of waiting, less the deadline
