"""Ranks add up what each reads of an adapter, and tell each other how that has ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loraplex_adapters.errors import UNREADABLE, AdapterRejected
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.following.notes import AdapterNotes
from loraplex_engine.ranks.group import Notes

NUMBER = 3  # of the load


@pytest.fixture
def notes() -> Notes:
    return Notes(None, 2)


def both(notes: Notes, load: Callable[[AdapterNotes, int], AdapterRejected | None]) -> AdapterRejected | None:
    """What the first of two ranks is told when each has loaded, in a thread."""
    ranks = [AdapterNotes(notes, Shard(rank, 2), lambda: None) for rank in (0, 1)]

    def run(rank: int) -> AdapterRejected | None:
        try:
            rejected = load(ranks[rank], rank)
        except AdapterRejected as error:
            rejected = error
        ranks[rank].tell(NUMBER, rejected)
        return ranks[0].others(NUMBER).rejected if rank == 0 else None

    with ThreadPoolExecutor(2) as threads:
        return next(threads.map(run, (0, 1)))


def test_a_load_that_ends_well_leaves_no_notes(notes: Notes) -> None:
    before = notes.store.num_keys()

    def load(rank: AdapterNotes, number: int) -> None:
        assert torch.equal(rank.total(NUMBER)("norms", torch.tensor([1.0 + number])), torch.tensor([3.0]))

    assert both(notes, load) is None
    assert notes.store.num_keys() == before


@pytest.mark.parametrize("failing", [0, 1])
def test_a_load_that_fails_on_one_rank_ends_on_both_and_leaves_no_notes(notes: Notes, failing: int) -> None:
    before = notes.store.num_keys()

    def load(rank: AdapterNotes, number: int) -> AdapterRejected | None:
        if number == failing:
            return AdapterRejected(["the disk failed"], UNREADABLE)
        rank.total(NUMBER)("norms", torch.ones(1))
        return None

    rejected = both(notes, load)
    assert rejected is not None
    problem = "rank 1: the disk failed" if failing else "rank 1: norms: its magnitudes need all ranks"
    assert rejected.problems[0].startswith(problem)
    assert (rejected.reason == UNREADABLE) == (failing == 1)
    assert notes.store.num_keys() == before
