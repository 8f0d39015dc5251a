"""Every path of the repository that the documentation names leads to a file or a folder."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

FOLDERS = (
    "proto",
    "client",
    "service",
    "engine",
    "adapters",
    "kernels",
    "demo",
    "tests",
    "benchmarks",
    "helm",
    "docs",
    "examples",
)


def paths(page: Path) -> Iterator[str]:
    """Those that begin with a folder at the top of the repository."""
    return (found[0] for found in re.finditer(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/.-]*[\w/]", page.read_text()))


# Results say what was where when they were measured.
LASTING = [page for page in PAGES if page.parent.name != "results"]


@pytest.mark.parametrize("page", LASTING, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_lead_to_files_that_are_there(page: Path) -> None:
    assert [path for path in paths(page) if not (ROOT / path).exists()] == []


def test_paths_are_found_at_all() -> None:
    assert len(list(paths(ROOT / "ARCHITECTURE.md"))) > 60
