"""Pages of lists."""

from itertools import pairwise

import pytest

from loraplex.v1.models_pb2 import ListModelsRequest, Model
from loraplex_service.control.paging import PAGE_BYTES, page
from loraplex_service.errors import InvalidRequest

ITEMS = [f"item-{number:02d}" for number in range(25)]


def named(item: str) -> Model:
    return Model(name=item)


def pages(items: list[str], size: int) -> list[list[str]]:
    found, token = [], ""
    while True:
        shown, token = page(items, str, named, ListModelsRequest(page_size=size, page_token=token))
        found.append([model.name for model in shown])
        if not token:
            return found


@pytest.mark.parametrize("size", [1, 7, 25, 1000])
def test_pages_together_are_all_items_once(size: int) -> None:
    found = pages(ITEMS, size)
    assert [item for shown in found for item in shown] == ITEMS
    assert all(len(shown) == size for shown, _ in pairwise(found))


def test_a_page_goes_on_after_an_item_that_is_gone() -> None:
    _, token = page(ITEMS, str, named, ListModelsRequest(page_size=5))
    rest = [item for item in ITEMS if item != "item-04"]
    shown, _ = page(rest, str, named, ListModelsRequest(page_size=2, page_token=token))
    assert [model.name for model in shown] == ["item-05", "item-06"]


def test_a_page_of_large_messages_ends_early_and_the_next_goes_on() -> None:
    def large(item: str) -> Model:
        return Model(name=item, source="x" * (PAGE_BYTES // 4))

    shown, token = page(ITEMS, str, large, ListModelsRequest())
    assert [model.name for model in shown] == ITEMS[:4]
    shown, _ = page(ITEMS, str, large, ListModelsRequest(page_token=token))
    assert shown[0].name == ITEMS[4]


@pytest.mark.parametrize("token", ["x", "//8=", "é"])
def test_a_token_of_ones_own_making_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match="page_token"):
        page(ITEMS, str, named, ListModelsRequest(page_token=token))
