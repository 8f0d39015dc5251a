"""The choice of a replica, as laws."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from loraplex_service.picker.policy import Health, Place, Standing, ranked

QUEUE, BALANCE = 4, 1.5


@st.composite
def fleets(draw: st.DrawFn) -> list[Standing]:
    def one(number: int) -> Standing:
        return Standing(
            f"10.0.0.{number}:50051",
            draw(st.sampled_from(Health)),
            draw(st.booleans()),
            draw(st.sampled_from(Place)),
            draw(st.integers(0, 20)),
        )

    return [one(number) for number in range(draw(st.integers(0, 6)))]


def best(fleet: list[Standing], key: str = "") -> list[str]:
    return [standing.endpoint for standing in ranked(fleet, key, QUEUE, BALANCE)]


def serving(number: int, place: Place = Place.ROOM, num_requests: int = 0) -> Standing:
    return Standing(f"10.0.0.{number}:50051", Health.SERVING, True, place, num_requests)


def is_crowded(standing: Standing, fleet: list[Standing]) -> bool:
    total = sum(each.num_requests for each in fleet)
    return standing.num_requests > QUEUE and standing.num_requests * len(fleet) > BALANCE * total


@given(fleets(), st.text(max_size=5))
def test_those_that_serve_and_are_known_are_named_once_each_and_no_others(fleet: list[Standing], key: str) -> None:
    serving = {each.endpoint for each in fleet if each.health is Health.SERVING}
    possible = serving | {each.endpoint for each in fleet if each.health is Health.UNKNOWN}
    known = {each.endpoint for each in fleet if each.endpoint in serving and each.is_fresh}
    named = best(fleet, key)
    assert len(named) == len(set(named))
    assert set(named) == (known if 2 * len(known) >= len(possible) else set())


def test_where_most_that_serve_are_not_known_the_few_do_not_get_everything() -> None:
    fleet = [serving(number) for number in range(3)]
    silent = [replace(each, is_fresh=False) for each in fleet]
    assert best([fleet[0], *silent[1:]]) == []
    assert len(best([*fleet[:2], silent[2]])) == 2


@given(fleets(), st.text(max_size=5), st.integers())
def test_the_order_in_which_replicas_are_known_changes_nothing(fleet: list[Standing], key: str, seed: int) -> None:
    shuffled = Random(seed).sample(fleet, len(fleet))
    assert best(shuffled, key) == best(fleet, key)


@given(fleets(), st.text(max_size=5))
def test_no_replica_has_the_adapter_nearer_than_the_first_unless_it_is_crowded(fleet: list[Standing], key: str) -> None:
    order = ranked(fleet, key, QUEUE, BALANCE)
    usable = list(order)
    for other in order[1:]:
        assert other.place <= order[0].place or is_crowded(other, usable)


@given(fleets(), st.text(max_size=5))
def test_of_replicas_with_the_adapter_as_near_the_first_has_the_fewest_requests(
    fleet: list[Standing], key: str
) -> None:
    order = ranked(fleet, key, QUEUE, BALANCE)
    equals = [each for each in order if each.place is order[0].place and not is_crowded(each, list(order))]
    assert all(order[0].num_requests <= each.num_requests for each in equals)


@given(fleets(), st.text(max_size=5))
def test_a_crowded_replica_is_first_only_where_all_are(fleet: list[Standing], key: str) -> None:
    order = list(ranked(fleet, key, QUEUE, BALANCE))
    if order and is_crowded(order[0], order):
        assert all(is_crowded(each, order) for each in order)


@given(fleets(), st.text(max_size=5), st.data())
def test_a_loser_that_goes_away_changes_nothing_for_the_others(
    fleet: list[Standing], key: str, data: st.DataObject
) -> None:
    known = [each for each in fleet if each.health is not Health.UNKNOWN]  # else it may be the last of the majority
    idle = [replace(each, num_requests=0, is_fresh=True) for each in known]
    named = best(idle, key)
    if len(named) > 1:
        gone = data.draw(st.sampled_from(named[1:]))
        left = best([each for each in idle if each.endpoint != gone], key)
        assert left == [endpoint for endpoint in named if endpoint != gone]


def test_cold_adapters_are_shared_out_among_idle_replicas() -> None:
    fleet = [serving(number) for number in range(3)]
    assert {best(fleet, f"adapter-{number}")[0] for number in range(30)} == {each.endpoint for each in fleet}


def test_active_comes_before_resident_before_room_before_full() -> None:
    places = (Place.FULL, Place.ACTIVE, Place.HOST, Place.ROOM, Place.DEVICE)
    fleet = [serving(number, place) for number, place in enumerate(places)]
    assert [standing.place for standing in ranked(fleet, "", QUEUE, BALANCE)] == sorted(places, reverse=True)


def test_a_hot_adapter_spreads_once_its_replica_has_more_than_any_may() -> None:
    home, others = serving(0, Place.ACTIVE, QUEUE), [serving(1), serving(2)]
    assert best([home, *others])[0] == home.endpoint
    busier = replace(home, num_requests=QUEUE + 1)
    assert best([busier, *others])[0] != home.endpoint


def test_a_hot_adapter_stays_where_it_is_while_all_have_as_much_to_do() -> None:
    home, others = serving(0, Place.ACTIVE, 30), [serving(1, num_requests=20), serving(2, num_requests=20)]
    assert best([home, *others])[0] == home.endpoint


def test_the_first_that_is_heard_of_does_not_get_what_is_for_all() -> None:
    fleet = [serving(number) for number in range(3)]
    unheard = [replace(each, health=Health.UNKNOWN, is_fresh=False) for each in fleet]
    assert best([fleet[0], *unheard[1:]]) == []
    assert best([*fleet[:2], unheard[2]]) != []
