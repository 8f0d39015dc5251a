"""The site of `make docs`: which pages it has, what is laid out for it, and that it builds."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loraplex
from loraplex.v1.inference_pb2 import DESCRIPTOR
from tests.docs.pages import PAGES, ROOT

NAVIGATION = (ROOT / "docs" / "mkdocs.yml").read_text()


@pytest.fixture(scope="module")
def site() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "build_site.py"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_is_in_the_navigation(page: Path) -> None:
    assert f"docs/{page.name}" in NAVIGATION


def test_what_the_navigation_names_is_laid_out(site: dict[str, Any], tmp_path: Path) -> None:
    site["stage"](tmp_path)
    named = re.findall(r": ([\w/.-]+\.md)$", NAVIGATION, re.MULTILINE)
    assert len(named) > 25
    assert [name for name in named if not (tmp_path / name).is_file()] == []


def test_all_pages_are_laid_out(site: dict[str, Any]) -> None:
    assert set(PAGES) <= set(site["pages"]())


def test_the_reference_has_every_method_with_its_comment(site: dict[str, Any]) -> None:
    text = site["reference"](ROOT / "proto" / "loraplex" / "v1")
    for service in DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            entry = re.search(rf"- `rpc {method.name}\(.*`<br>\n +(.+)", text)
            assert entry is not None, method.name
            assert len(entry[1]) > 10


@pytest.mark.parametrize("name", loraplex.__all__)
def test_the_reference_of_the_client_has_everything_that_it_exports_with_its_docstring(
    site: dict[str, Any], name: str
) -> None:
    entry = re.search(rf"^## {name}\n\n(.+)", site["client_reference"](), re.MULTILINE)
    assert entry is not None
    assert len(entry[1]) > 10


def test_the_reference_of_the_client_lists_the_options_of_a_call(site: dict[str, Any]) -> None:
    _, _, text = site["client_reference"]().partition("### Client.generate\n")
    call, _, _ = text.partition("\n### ")
    assert "**Args:**\n\n- `model`: Name of a model" in call
    assert re.search(r"^- `temperature`: ", call, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_strictly() -> None:
    ended = subprocess.run([sys.executable, ROOT / "docs/build_site.py"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
