"""How many drafts a request may have, by what they won and cost so far."""

from __future__ import annotations

import pytest

from loraplex_engine.drafting.account import GRANT, SHARE, Account
from loraplex_engine.drafting.costs import StepCosts

CHEAP = [0.05 * count for count in range(1, 9)]
DEAR = [0.3 * count for count in range(1, 9)]


def settled(prices: list[float], right: bool, steps: int) -> tuple[Account, float, int]:
    """The account of a request whose drafts are all right, or all wrong; what they cost, and the tokens they saved."""
    account, spent, won = Account(), 0.0, 0
    for _ in range(steps):
        account.draw()
        count = account.affordable(prices)
        if count:
            spent, won = spent + prices[count - 1], won + count * right
            account.settle(prices[count - 1], count, count * right)
    return account, spent, won


@pytest.mark.parametrize("prices", [CHEAP, DEAR])
def test_drafts_that_are_right_come_to_be_as_many_as_may_be(prices: list[float]) -> None:
    account, _, _ = settled(prices, right=True, steps=20)
    assert account.affordable(prices) == len(prices)


@pytest.mark.parametrize("prices", [CHEAP, DEAR, [0.9], [4.0]])
@pytest.mark.parametrize("steps", [50, 1000])
def test_drafts_that_are_wrong_cost_no_more_than_the_grant_and_a_share_of_the_tokens(
    prices: list[float], steps: int
) -> None:
    _, spent, _ = settled(prices, right=False, steps=steps)
    assert spent <= GRANT + SHARE * steps + 1e-9


def test_drafts_that_were_wrong_are_tried_again_and_come_back_when_they_are_right() -> None:
    account, _, _ = settled(DEAR, right=False, steps=500)
    tried = 0
    for _ in range(100):
        account.draw()
        count = account.affordable(DEAR)
        tried += bool(count)
        if count:
            account.settle(DEAR[count - 1], count, count)
    assert tried > 20
    assert account.affordable(DEAR) == len(DEAR)


def test_guesses_that_were_right_without_being_computed_earn_drafts_and_wrong_ones_take_them_back() -> None:
    account, _, _ = settled(DEAR, right=False, steps=500)
    assert account.affordable(DEAR) == 0
    for _ in range(6):
        account.watch(True)
    assert account.affordable(DEAR) > 0
    for _ in range(6):
        account.watch(False)
    assert account.affordable(DEAR) == 0


def test_steps_are_watched_more_rarely_while_guesses_are_wrong() -> None:
    account = Account()

    def watched(steps: int, right: bool | None) -> int:
        count = 0
        for _ in range(steps):
            if account.may_watch():
                count += 1
                account.watch(right)
        return count

    assert watched(80, False) < 15
    assert watched(80, None) == 10
    assert watched(80, True) > 70


def test_drafts_that_could_never_pay_are_never_tried() -> None:
    account = Account()
    for _ in range(10_000):
        account.draw()
        assert account.affordable([1.0, 2.0]) == 0


def test_the_time_of_a_step_is_the_median_of_its_latest_times() -> None:
    costs = StepCosts({1: 1.0})
    for seconds in (2.0, 2.0, 90.0):
        costs.note(1, seconds)
    assert costs.seconds(1) == 2.0


def test_times_that_were_not_seen_since_change_as_those_that_were() -> None:
    costs = StepCosts({1: 20.0, 2: 24.0, 4: 40.0})
    costs.note(4, 30.0)
    costs.note(1, 10.0)  # the machine is twice as fast as it was when it was measured
    assert [costs.seconds(rows) for rows in (1, 2, 4)] == [10.0, 12.0, 30.0]


def test_times_that_were_not_measured_at_first_change_no_others() -> None:
    costs = StepCosts({1: 20.0, 4: 40.0})
    costs.note(3, 1.0)
    assert [costs.seconds(rows) for rows in (1, 3, 4)] == [20.0, 1.0, 40.0]


@pytest.mark.parametrize(("rows", "seconds"), [(1, 10.0), (2, 11.0), (3, 13.0), (4, 15.0), (6, 19.0)])
def test_times_that_were_not_measured_lie_between_those_that_were(rows: int, seconds: float) -> None:
    assert StepCosts({1: 10.0, 2: 11.0, 4: 15.0}).seconds(rows) == seconds


@pytest.mark.parametrize(("rows", "seconds"), [(1, 12.0), (3, 11.0), (8, 10.0), (100, 10.0)])
def test_times_that_fall_with_the_rows_by_accident_stay_above_nothing(rows: int, seconds: float) -> None:
    assert StepCosts({2: 12.0, 4: 10.0}).seconds(rows) == seconds


def test_with_one_time_known_every_row_takes_as_long() -> None:
    assert StepCosts({2: 10.0}).seconds(6) == 30.0


def test_the_price_of_rows_is_in_tokens_of_a_step_without_them() -> None:
    costs = StepCosts({1: 10.0, 4: 16.0, 8: 24.0})
    assert costs.prices(1, 1, 2) == pytest.approx([0.2, 0.4])
    assert costs.prices(4, 4, 1) == pytest.approx([0.5])  # of four tokens that take 4 s each
    assert costs.prices(4, 4, 0) == []
