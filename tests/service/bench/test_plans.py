"""The requests of `loraplex bench`: lengths, who is asked, and when."""

import itertools
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest

from loraplex_service.bench.loops import moments
from loraplex_service.bench.plans import Plan, make_requests, parse_length

POOL = range(100, 140)
POOLS = dict.fromkeys(("base", "first", "second"), POOL)
PLAN = Plan(tuple(POOLS), 1.0, parse_length("8"), parse_length("4"), 0, 0, 600, "0")


@pytest.mark.parametrize(("text", "least", "most"), [("7", 7, 7), ("3-9", 3, 9), ("~20", 4, 10_000)])
def test_a_length_is_within_what_was_said(text: str, least: int, most: int) -> None:
    draw, rng = parse_length(text), random.Random(0)
    drawn = [draw(rng) for _ in range(500)]
    assert min(drawn) >= least
    assert max(drawn) <= most
    assert (len(set(drawn)) == 1) == (text == "7")


def test_a_length_told_by_its_mean_has_it() -> None:
    draw, rng = parse_length("~200"), random.Random(0)
    assert statistics.fmean(draw(rng) for _ in range(20_000)) == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize("text", ["", "0", "9-3", "a", "-4", "~", "~0", "1.5"])
def test_what_is_no_length_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(ValueError, match="give N tokens, A-B"):
        parse_length(text)


def test_models_are_asked_by_their_place() -> None:
    asked = Counter(request.model for request in make_requests(PLAN, POOLS, None))
    assert asked["base"] > asked["first"] > asked["second"]
    assert asked["base"] / asked["second"] == pytest.approx(3, rel=0.4)


def test_without_a_skew_all_are_asked_alike() -> None:
    asked = Counter(request.model for request in make_requests(replace(PLAN, skew=0.0), POOLS, None))
    assert max(asked.values()) < 1.3 * min(asked.values())


def test_requests_are_the_same_at_every_rate() -> None:
    slow, fast = (make_requests(PLAN, POOLS, rate) for rate in (1.0, 2.0))
    assert [request.prompt for request in slow] == [request.prompt for request in fast]
    assert [request.moment for request in slow] == pytest.approx([2 * request.moment for request in fast])


def test_another_seed_makes_other_prompts() -> None:
    one, other = (make_requests(replace(PLAN, seed=seed), POOLS, None) for seed in ("0/0", "0/1"))
    assert one[0].prompt != other[0].prompt


def test_prompts_share_the_prefix_that_they_are_to_share() -> None:
    requests = make_requests(replace(PLAN, shared_prefix=16), POOLS, None)
    assert len({tuple(request.prompt[:16]) for request in requests}) == 1
    assert len({tuple(request.prompt[16:]) for request in requests}) > 500


def test_who_is_asked_is_sent_tokens_of_its_own_model() -> None:
    requests = make_requests(replace(PLAN, shared_prefix=4), {**POOLS, "second": range(1000, 1040)}, None)
    for request in requests:
        assert {token >= 1000 for token in request.prompt} == {request.model == "second"}


def test_no_request_is_longer_than_the_context() -> None:
    plan = replace(PLAN, prompt=parse_length("~200"), output=parse_length("~200"), shared_prefix=10, longest=64)
    assert max(len(request.prompt) + request.output for request in make_requests(plan, POOLS, None)) <= 64


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0, 2.0])
def test_arrivals_have_their_rate_and_their_variation(variation: float) -> None:
    when = list(moments(random.Random(0), 5.0, variation, 20_000))
    between = [after - before for before, after in itertools.pairwise(when)]
    assert statistics.fmean(between) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(between) / 0.2 == pytest.approx(variation, abs=0.12)
