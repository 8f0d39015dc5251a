"""Every path that ARCHITECTURE.md and CONTRIBUTING.md name leads to a file or a folder."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

FOLDERS = ("proto", "client", "service", "engine", "adapters", "kernels", "demo", "tests", "benchmarks", "helm", "docs")


def paths(page: Path) -> Iterator[str]:
    """Those that begin with a folder at the top of the repository."""
    return (found[0] for found in re.finditer(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/.-]*[\w/]", page.read_text()))


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_paths_lead_to_files_that_are_there(name: str) -> None:
    named = list(paths(ROOT / name))
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert len(named) > 2
