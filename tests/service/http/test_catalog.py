"""Pages of the list of models, as Anthropic's clients ask for them."""

from typing import Any

import pytest

from loraplex_service.http.catalog import page
from loraplex_service.http.failures import Refusal

MODELS = [{"id": each} for each in "abcd"]


@pytest.mark.parametrize(
    ("asked", "shown", "has_more"),
    [
        ({}, "abcd", False),
        ({"limit": "2"}, "ab", True),
        ({"limit": "2", "after_id": "b"}, "cd", False),
        ({"after_id": "d"}, "", False),
        ({"limit": "2", "before_id": "d"}, "bc", True),
        ({"before_id": "c"}, "ab", False),
    ],
)
def test_a_page_has_what_is_asked_for(asked: dict[str, str], shown: str, has_more: bool) -> None:
    told: dict[str, Any] = page(MODELS, asked)
    assert ("".join(each["id"] for each in told["data"]), told["has_more"]) == (shown, has_more)
    assert (told["first_id"], told["last_id"]) == ((shown[0], shown[-1]) if shown else (None, None))


@pytest.mark.parametrize("asked", [{"limit": "0"}, {"limit": "x"}, {"limit": "1" * 5000}, {"after_id": "z"}])
def test_a_page_that_cannot_be_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(Refusal) as raised:
        page(MODELS, asked)
    assert (raised.value.status, raised.value.param) == (400, next(iter(asked)))
