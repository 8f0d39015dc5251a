"""Every link of the documentation leads somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, prose


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of each link that stays in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"there is no {target.relative_to(ROOT)}"
        if anchor:
            assert anchor in anchors(target), f"{target.relative_to(ROOT)} has no heading for #{anchor}"


def test_links_are_found_at_all() -> None:
    assert sum(1 for page in PAGES for _ in links(page)) > 30
